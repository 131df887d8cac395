"""Encodings that are changed after they were made: ids, labels and spans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench_mask import Made
from gallery import Artifact, mutant

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX


def supervised(made: Made, choose: Callable[[Made], bool]) -> Made:
    """Label an encoding by the spans that are chosen."""
    spans = [span | {"supervised": bool(choose(span))} for span in made["spans"]]
    return made | {"spans": spans, "labels": _labels(made["input_ids"], spans)}


def with_ids(made: Made, at: int, ids: Any) -> Made:
    """Put other ids in the place of one, and move what follows."""
    moved = len(ids) - 1
    changed = [*made["input_ids"][:at], *ids, *made["input_ids"][at + 1 :]]
    spans = [
        span | {"start": span["start"] + moved * (span["start"] > at), "end": span["end"] + moved * (span["end"] > at)}
        for span in made["spans"]
    ]
    return made | {"input_ids": changed, "spans": spans, "labels": _labels(changed, spans)}


def _labels(ids: list[int], spans: list[Made]) -> list[int]:
    return [
        token if span["supervised"] else IGNORE_INDEX for span in spans for token in ids[span["start"] : span["end"]]
    ]


def marker_apart(made: Made) -> Made:
    """Take the marker of each tool call out of the loss."""
    spans: list[Made] = []
    for span in made["spans"]:
        if span["kind"] == "tool_call":
            spans.append(span | {"end": span["start"] + 1, "kind": "control", "supervised": False})
            span = span | {"start": span["start"] + 1}
        spans.append(span)
    return made | {"spans": spans, "labels": _labels(made["input_ids"], spans)}


@mutant("ML101 ML104 ML107")
def _labels_shifted(artifact: Artifact) -> None:
    """The labels are shifted by one."""
    artifact["after"] = lambda made: made | {"labels": [IGNORE_INDEX, *made["labels"][:-1]]}


@mutant("ML101 ML107")
def _labels_of_other_ids(artifact: Artifact) -> None:
    """The labels are the ids of other tokens."""
    artifact["after"] = lambda made: made | {"labels": [label + (label > 2) for label in made["labels"]]}


@mutant("ML101 ML104 ML107")
def _labels_too_few(artifact: Artifact) -> None:
    """There are fewer labels than ids."""
    artifact["after"] = lambda made: made | {"labels": made["labels"][:-1]}


@mutant("ML101 ML104")
def _a_hole_in_the_spans(artifact: Artifact) -> None:
    """A span is missing, so that some tokens have no owner."""
    artifact["after"] = lambda made: made | {"spans": [span for span in made["spans"] if span["kind"] != "eos"]}


@mutant("ML102 ML107")
def _the_user_is_supervised(artifact: Artifact) -> None:
    """The user's tokens are supervised too."""
    artifact["after"] = lambda made: supervised(made, lambda span: span["role"] in ("user", "assistant"))


@mutant("ML102 ML105 ML107")
def _bos_is_supervised(artifact: Artifact) -> None:
    """BOS is supervised."""
    artifact["after"] = lambda made: supervised(made, lambda span: span["role"] in (None, "assistant"))


@mutant("ML103 ML107", "I04")
def _a_mask_of_zeros(artifact: Artifact) -> None:
    """The template marks no answer, and the mask is all zeros."""
    artifact["after"] = lambda made: supervised(made, lambda span: False)


@mutant("ML103 ML107", "I05")
def _the_marker_is_searched_for(artifact: Artifact) -> None:
    """The collator searches for the ids of the marker alone; inside a row they differ, so it finds nothing."""
    marker = list(artifact["tokenizer"].encode_text("[/INST]"))

    def after(made: Made) -> Made:
        ids = made["input_ids"]
        found = [n for n in range(len(ids)) if ids[n : n + len(marker)] == marker]
        return supervised(made, lambda span: bool(found) and span["start"] >= found[0])

    artifact["after"] = after


@mutant("ML101 ML104 ML107", "I13")
def _a_mask_from_prefixes(artifact: Artifact) -> None:
    """Each answer is the difference of the prefix that ends with it and the prefix before it."""
    tokenizer, rows = artifact["tokenizer"], []
    artifact["before"] = lambda row: rows.append(row) or row

    def after(made: Made) -> Made:
        labels = [IGNORE_INDEX] * len(made["input_ids"])
        messages = rows[-1]["messages"]
        for index in [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
            prefix = rows[-1] | {"messages": messages[: index + 1]}
            place = slice(len(tokenizer.encode_prompt(prefix)), len(tokenizer.encode(prefix).input_ids))
            labels[place] = made["input_ids"][place]
        return made | {"labels": labels}

    artifact["after"] = after


@mutant("ML103")
def _weights_are_ignored(artifact: Artifact) -> None:
    """An answer of weight 0 is trained on."""
    artifact["row"]["messages"][2]["weight"] = 0
    artifact["after"] = lambda made: supervised(made, lambda span: span["role"] == "assistant")


@mutant("ML103 ML107")
def _only_the_last_answer(artifact: Artifact) -> None:
    """Only the last answer is supervised, though every one has weight 1."""
    artifact["after"] = lambda made: supervised(made, lambda span: span["turn"] == made["spans"][-1]["turn"])


@mutant("ML103 ML104 ML107", "I01")
def _eos_is_masked(artifact: Artifact) -> None:
    """The pad id is masked, and pad is EOS."""
    artifact["after"] = lambda made: supervised(made, lambda span: span["supervised"] and span["kind"] != "eos")


@mutant("ML104 ML107", "I02")
def _eos_is_missing(artifact: Artifact) -> None:
    """The row ends without EOS."""

    def after(made: Made) -> Made:
        return {name: values[:-1] for name, values in made.items()}

    artifact["after"] = after


@mutant("ML105 ML107 ML112", "I03")
def _bos_twice(artifact: Artifact) -> None:
    """The template writes BOS, and the tokenizer adds another."""
    bos = artifact["tokenizer"].bos_id
    artifact["after"] = lambda made: with_ids(made, 0, [bos, bos])


@mutant("ML105 ML107 ML112")
def _no_bos(artifact: Artifact) -> None:
    """BOS is left out: a space stands in its place."""
    space = artifact["tokenizer"].encode_text(" ")
    artifact["after"] = lambda made: with_ids(made, 0, space)


@mutant("ML106 ML107 ML112", "I22")
def _a_user_forges_eos(artifact: Artifact) -> None:
    """The text </s> of a user becomes EOS."""
    eos = artifact["tokenizer"].eos_id

    def after(made: Made) -> Made:
        text = next(span for span in made["spans"] if span["role"] == "user" and span["kind"] == "text")
        return with_ids(made, text["end"] - 1, [eos])

    artifact["after"] = after


@mutant("ML103 ML104 ML107 ML109")
def _a_turn_is_taken_for_another(artifact: Artifact) -> None:
    """A tool's turn is taken for the assistant's, by its spans too."""

    def after(made: Made) -> Made:
        spans = [span | {"role": "assistant"} if span["role"] == "tool" else span for span in made["spans"]]
        return supervised(made | {"spans": spans}, lambda span: span["role"] == "assistant")

    artifact["after"] = after


@mutant("ML107 ML109")
def _another_answer(artifact: Artifact) -> None:
    """Another word is supervised than the assistant's text has."""
    never = artifact["tokenizer"].encode_text("Never")[:1]
    artifact["after"] = lambda made: with_ids(made, made["spans"][-2]["start"], never)


@mutant("ML103 ML104 ML107 ML110")
def _a_call_without_its_marker(artifact: Artifact) -> None:
    """The marker of a tool call carries no loss."""
    artifact["after"] = marker_apart
