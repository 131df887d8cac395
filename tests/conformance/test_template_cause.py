"""A chat template of another layout is the one cause of the differences of the rows that it encodes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from derived_tekken import write_cut
from faulty_templates import CHATML

from pytest_mistral_lora import Verdict, audit, judge
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine
from pytest_mistral_lora.conformance.encoded.template_cause import TemplateCause
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError

HISTORY = ["What is 2 + 2?", "It is 4.", "And 3 + 3?", "It is 6, I think."]
SHORT = ["Who are you?", "A model."]
Record = dict[str, Any]


def messages(texts: list[str], system: str = "") -> list[dict[str, str]]:
    first = [{"role": "system", "content": system}] if system else []
    roles = ["user", "assistant"] * len(texts)
    return first + [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Mistral's file and those of transformers, of few words: each audit loads it."""
    folder = tmp_path_factory.mktemp("saved")
    CheckpointTokenizer(write_cut(folder, words=2000)).fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(saved: Path) -> Any:
    return CheckpointTokenizer(saved).fast


@pytest.fixture(scope="module")
def folder(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(saved, tmp_path_factory.mktemp("chatml") / "checkpoint"))
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def encode(tokenizer: Any) -> Callable[..., Record]:
    """Encode a conversation by the template, with labels on its answers and their ends, as trainers make them."""

    def encode(said: list[dict[str, str]], template: str = CHATML) -> Record:
        text, labelled = "", []
        for number, message in enumerate(said):
            whole = tokenizer.apply_chat_template(said[: number + 1], tokenize=False, chat_template=template)
            end = f"{message['content']}<|im_end|>"
            at = whole.index(message["content"], len(text))
            labelled += [(at, at + len(end))] if message["role"] == "assistant" else []
            text = whole
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [any(a < end and b > start for start, end in labelled) for a, b in encoded["offset_mapping"]]
        ids = list(encoded["input_ids"])
        return {"input_ids": ids, "labels": [token if kept else -100 for token, kept in zip(ids, inside, strict=True)]}

    return encode


def rules(verdict: Verdict) -> list[str]:
    return [finding.rule for finding in verdict.findings]


@pytest.mark.parametrize("has_messages", [True, False])
def test_a_template_of_another_layout_is_one_finding(
    has_messages: bool, folder: Path, encode: Callable[..., Record]
) -> None:
    said = [messages(HISTORY), messages(SHORT), messages(SHORT, "Be brief.")]
    records = [encode(each) for each in said]
    records[1]["input_ids"].append(2)  # EOS of a trainer
    records[1]["labels"].append(2)
    if has_messages:
        records = [record | {"messages": each} for record, each in zip(records, said, strict=True)]
    [finding] = audit(records, tokenizer=folder).findings
    assert (finding.rule, str(finding.place)) == ("ML004", f"{folder}/chat_template.jinja")
    assert sum(count for _, count in finding.covers) >= len(records)
    assert str(folder) in finding.next_step


def test_a_second_fault_is_reported_beside_it(folder: Path, encode: Callable[..., Record]) -> None:
    said = messages(HISTORY)
    sound = encode(said)
    ids, labels = sound["input_ids"], sound["labels"]
    trained = [n for n, label in enumerate(labels) if label != -100]
    user = trained[0] - 25
    records = [
        sound,
        {"input_ids": ids, "labels": ids},
        {"input_ids": ids, "labels": [*labels[:user], ids[user], *labels[user + 1 :]]},
        {"input_ids": ids, "labels": [*labels[: trained[2]], -100, *labels[trained[2] + 1 :]]},
    ]
    records.append({"input_ids": ids[:-10], "labels": labels[:-10]})
    records = [record | {"messages": said} for record in records]
    first, *others = audit(records, tokenizer=folder).findings
    assert first.rule == "ML004"
    found = {(finding.rule, str(finding.place)) for finding in others}
    assert found == {("ML543", "rows[1]"), ("ML547", "rows[2]"), ("ML550", "rows[3]"), ("ML531", "rows[4]")}


def test_labels_beside_it_are_judged_by_a_declared_objective(folder: Path, encode: Callable[..., Record]) -> None:
    said = [messages(HISTORY), messages(SHORT)]
    by_answers = [encode(each) for each in said]
    everything = [{**record, "labels": record["input_ids"]} for record in by_answers]
    last = [{**record, "labels": [*record["labels"]]} for record in by_answers]
    first_answer = next(n for n, label in enumerate(last[0]["labels"]) if label != -100)
    end = last[0]["labels"].index(-100, first_answer)
    last[0]["labels"][first_answer:end] = [-100] * (end - first_answer)
    for objective, labels in (("answers", by_answers), ("everything", everything), ("last-answer", last)):
        for words, records in (("answers", by_answers), ("everything", everything), ("last-answer", last)):
            found = audit(records, tokenizer=folder, objective=objective).findings
            assert found[0].rule == "ML004"
            assert (len(found) == 1) == (labels is records), (objective, words, found)


def test_packed_rows_are_taken_apart_at_their_positions(folder: Path, encode: Callable[..., Record]) -> None:
    parts = [encode(messages(SHORT)), encode(messages(HISTORY)), encode(messages(SHORT))]
    packed = {key: [value for part in parts for value in part[key]] for key in ("input_ids", "labels")}
    packed["position_ids"] = [n for part in parts for n in range(len(part["input_ids"]))]
    verdict = audit([packed], tokenizer=folder)
    assert rules(verdict) == ["ML004"]
    leaking = packed | {"attention_mask": [1] * len(packed["input_ids"])}
    assert rules(audit([leaking], tokenizer=folder)) == ["ML004", "ML513"]


def test_rows_of_another_template_keep_their_findings(folder: Path, encode: Callable[..., Record]) -> None:
    said = messages(SHORT)
    other = CHATML.replace("<|im_start|>", "<|start|>")
    records = [encode(said) | {"messages": said}, encode(said, other) | {"messages": said}]
    first, *others = audit(records, tokenizer=folder).findings
    assert first.rule == "ML004"
    assert others
    assert {str(finding.place) for finding in others} == {"rows[1]"}


def test_a_sound_template_explains_nothing(saved: Path, encode: Callable[..., Record]) -> None:
    said = messages(SHORT)
    found = rules(audit([encode(said) | {"messages": said}], tokenizer=saved))
    assert "ML004" not in found
    assert "ML533" in found


def test_the_check_of_the_folder_has_one_cause(tmp_path: Path) -> None:
    # beside tekken.json, the template would be a cause of its own
    converted_tokenizer("spm-v3").fast.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    verdict = judge(tmp_path, examples=1)
    first, *others = verdict.findings
    assert first.rule == "ML004"
    assert {rule for rule, _ in first.covers} == {"ML004", "ML226"}
    assert {finding.rule for finding in others} == {"ML004"}
    assert "of 1 cause;" in str(verdict)


@pytest.mark.parametrize(("explained", "tried"), [([], 20), ([19], 40), ([0, 20], 41), ([21], 20)])
def test_a_template_that_explains_no_line_is_tried_for_a_few(
    explained: list[int], tried: int, folder: Path, encode: Callable[..., Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = []
    encode_stretch = TemplateCause._encode_stretch

    def counted(self: TemplateCause, row: Any, stretch: Any, *given: Any) -> Any:
        lines.append(stretch.place)
        return encode_stretch(self, row, stretch, *given)

    monkeypatch.setattr(TemplateCause, "_encode_stretch", counted)
    said = messages(SHORT)
    own, other = encode(said), encode(said, CHATML.replace("<|im_start|>", "<|start|>"))
    audit([(own if n in explained else other) | {"messages": said} for n in range(45)], tokenizer=folder)
    assert len(lines) == tried


def test_a_template_that_does_not_load_explains_nothing() -> None:
    def load() -> ChatTemplate:
        raise InputError("not valid Jinja", place="chat_template.jinja")

    cause = TemplateCause(load=load, judge=lambda: Finding("ML004", "other ids", "chat_template.jinja"))
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    assert cause.encode(EncodedLine("rows:1", 0, (), input_ids=(1, 3, 4), labels=(-100, -100, 4)), oracle) is None
