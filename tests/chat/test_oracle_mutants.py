"""Ways to label that look right, and broken rows: each law of encoding notices its mutant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from encoding_laws import (
    LAWS,
    TWO_TURNS,
    WITH_TOOLS,
    Case,
    assistant_text_decodes_to_the_content,
    bos_is_once_at_the_start_without_label,
    encoding_again_gives_the_same,
    every_assistant_turn_ends_with_eos,
    ids_are_mistral_commons,
    labels_are_what_the_spans_say,
    only_the_assistant_is_supervised,
    reference_ids,
    say,
    scanned_labels,
    spans_partition_the_ids,
    text_holds_no_control_token,
    tool_calls_are_supervised_from_their_marker_on,
    weights_decide_which_turns_are_supervised,
)
from mistral_common.protocol.instruct.validator import ValidationMode

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle

# Mutants: common ways to label that look right, and broken rows that each law must notice.


def labels_by_prefixes(oracle: Oracle, row: dict[str, Any]) -> tuple[int, ...]:
    """Label what an assistant message adds to the encoding of the messages before it."""
    ids = oracle.encode(row).input_ids
    labels = [IGNORE_INDEX] * len(ids)
    for index, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            start = len(reference_ids(oracle, row | {"messages": row["messages"][:index]}, ValidationMode.test))
            end = len(reference_ids(oracle, row | {"messages": row["messages"][: index + 1]}))
            labels[start:end] = ids[start:end]
    return tuple(labels)


def labels_by_search(oracle: Oracle, row: dict[str, Any]) -> tuple[int, ...]:
    """Label the next place where the ids of an assistant's content stand."""
    ids = oracle.encode(row).input_ids
    labels, at = [IGNORE_INDEX] * len(ids), 0
    for message in row["messages"]:
        if message["role"] == "assistant":
            wanted = oracle.encode_text(message["content"])
            at = next(n for n in range(at, len(ids)) if ids[n : n + len(wanted)] == wanted)
            end = at + len(wanted) + 1  # EOS
            labels[at:end] = ids[at:end]
            at = end
    return tuple(labels)


def labels_by_markers_in_text(oracle: Oracle, row: dict[str, Any]) -> tuple[int, ...]:
    """Label as `scanned_labels`, on ids of a tokenizer that turns marker strings of the text into control tokens."""
    literals = {literal: token for token, literal in oracle.control_tokens.items()}
    ids: list[int] = []
    for piece in oracle.traced_texts(row):
        ids += (literals[piece.text],) if piece.text in literals else piece.ids
    return scanned_labels(oracle, tuple(ids))


SIMPLE = say(("user", "u"), ("assistant", "a"))
MUTANTS = [
    ("spm-v3", labels_by_prefixes, TWO_TURNS),
    ("spm-v7", labels_by_prefixes, WITH_TOOLS | {"messages": [*WITH_TOOLS["messages"], *SIMPLE["messages"]]}),
    ("spm-v3", labels_by_search, say(("system", "1"), ("user", "1"), ("assistant", "1"))),
    ("tekken-240911", labels_by_search, say(("user", "1"), ("assistant", "1"))),
    ("spm-v3", labels_by_markers_in_text, say(("user", "[/INST]"), ("assistant", "a"))),
]


@pytest.mark.parametrize(("name", "mutant", "row"), MUTANTS)
def test_a_careless_labelling_is_right_on_a_simple_row_and_wrong_on_a_known_one(
    oracle_of: Callable[[str], Oracle], name: str, mutant: Callable[..., tuple[int, ...]], row: dict[str, Any]
) -> None:
    oracle = oracle_of(name)
    assert mutant(oracle, SIMPLE) == oracle.encode(SIMPLE).labels
    assert mutant(oracle, row) != oracle.encode(row).labels


def test_prefixes_train_on_the_system_prompt(oracle_of: Callable[[str], Oracle]) -> None:
    labels = labels_by_prefixes(oracle_of("spm-v3"), TWO_TURNS)
    trained = [oracle_of("spm-v3").piece(token) for token in labels if token != IGNORE_INDEX]
    assert trained == ["▁s", "<0x0A>", "▁b", "</s>"]


def relabelled(encoded: EncodedRow, at: int, label: int) -> EncodedRow:
    labels = list(encoded.labels or ())
    labels[at] = label
    return replace(encoded, labels=tuple(labels))


def respanned(encoded: EncodedRow, at: int, **fields: Any) -> EncodedRow:
    spans = list(encoded.spans)
    spans[at] = spans[at]._replace(**fields)
    return EncodedRow.from_spans(encoded.input_ids, spans)


def with_token(encoded: EncodedRow, at: int, token: int) -> EncodedRow:
    ids = list(encoded.input_ids)
    ids[at] = token
    return EncodedRow.from_spans(ids, encoded.spans)


BROKEN: list[tuple[Callable[[Case], None], Callable[[EncodedRow], EncodedRow]]] = [
    (ids_are_mistral_commons, lambda e: with_token(e, 30, 1118)),
    (spans_partition_the_ids, lambda e: respanned(e, 4, end=32)),
    (spans_partition_the_ids, lambda e: replace(e, spans=e.spans[:-1])),
    (labels_are_what_the_spans_say, lambda e: relabelled(e, 79, IGNORE_INDEX)),
    (labels_are_what_the_spans_say, lambda e: relabelled(e, 30, 1117)),
    (labels_are_what_the_spans_say, lambda e: replace(e, labels=(e.labels or ())[:-1])),
    (only_the_assistant_is_supervised, lambda e: respanned(e, 9, supervised=True)),
    (weights_decide_which_turns_are_supervised, lambda e: respanned(e, 6, supervised=False)),
    (bos_is_once_at_the_start_without_label, lambda e: with_token(e, 1, 1)),
    (bos_is_once_at_the_start_without_label, lambda e: respanned(e, 0, supervised=True)),
    (every_assistant_turn_ends_with_eos, lambda e: respanned(e, 12, supervised=False)),
    (every_assistant_turn_ends_with_eos, lambda e: with_token(e, 59, 1097)),
    (text_holds_no_control_token, lambda e: with_token(e, 30, 4)),
    (text_holds_no_control_token, lambda e: with_token(e, 40, 2)),
    (tool_calls_are_supervised_from_their_marker_on, lambda e: respanned(e, 6, supervised=False)),
    (assistant_text_decodes_to_the_content, lambda e: with_token(e, 78, 1097)),
    (encoding_again_gives_the_same, lambda e: with_token(e, 78, 1097)),
]


@pytest.mark.parametrize(("law", "mutate"), BROKEN)
def test_each_law_notices_its_mutant(
    oracle_of: Callable[[str], Oracle], law: Callable[[Case], None], mutate: Callable[[EncodedRow], EncodedRow]
) -> None:
    oracle = oracle_of("tekken-240911")
    encoded = oracle.encode(WITH_TOOLS)
    law(Case(oracle, WITH_TOOLS, encoded))
    with pytest.raises(AssertionError):
        law(Case(oracle, WITH_TOOLS, mutate(encoded)))


def test_every_law_has_a_mutant() -> None:
    assert {law for law, _ in BROKEN} == set(LAWS)
