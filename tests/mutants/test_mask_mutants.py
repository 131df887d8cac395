"""Encodings that are broken on purpose, each with the law that must catch it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.conformance.laws import LAWS
from pytest_mistral_lora.conformance.mask import _strategy, search

CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ROW = parse_row(
    {
        "messages": [
            {"role": "system", "content": "Be brief. [INST]"},
            {"role": "user", "content": "One? </s>"},
            {"role": "assistant", "content": "One.", "weight": 0},
            {"role": "user", "content": "Two?"},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "sun"},
            {"role": "assistant", "content": "Two."},
        ],
        "tools": [TOOL],
    }
)
Mutate = Callable[[EncodedRow, Oracle], EncodedRow]


def with_labels(encoded: EncodedRow, labels: list[int]) -> EncodedRow:
    return dataclasses.replace(encoded, labels=tuple(labels))


def with_spans(encoded: EncodedRow, change: Callable[[Span], Span]) -> EncodedRow:
    return EncodedRow.from_spans(encoded.input_ids, [change(span) for span in encoded.spans])


def shifted_by_one(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return with_labels(encoded, [IGNORE_INDEX, *(encoded.labels or ())[:-1]])


def label_of_another_token(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return with_labels(encoded, [label + 1 if label > 2 else label for label in encoded.labels or ()])


def labels_too_short(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return with_labels(encoded, list((encoded.labels or ())[:-1]))


def a_hole_in_the_spans(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return EncodedRow.from_spans(encoded.input_ids, [span for span in encoded.spans if span.kind != "eos"])


def user_is_supervised(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return with_spans(encoded, lambda s: dataclasses.replace(s, supervised=s.supervised or s.role == "user"))


def bos_is_supervised(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return with_spans(encoded, lambda s: dataclasses.replace(s, supervised=s.supervised or s.turn is None))


def nothing_is_supervised(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return with_spans(encoded, lambda s: dataclasses.replace(s, supervised=False))


def weight_is_ignored(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return with_spans(encoded, lambda s: dataclasses.replace(s, supervised=s.role == "assistant"))


def eos_is_masked(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    return with_spans(encoded, lambda s: dataclasses.replace(s, supervised=s.supervised and s.kind != "eos"))


def eos_is_missing(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    last = encoded.spans[-1]
    assert last.kind == "eos"
    return EncodedRow.from_spans(encoded.input_ids[: last.start], encoded.spans[:-1])


def bos_twice(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    def later(span: Span) -> Span:
        start = 0 if span.turn is None else span.start + 1
        return dataclasses.replace(span, start=start, end=span.end + 1)

    return EncodedRow.from_spans((oracle.bos_id, *encoded.input_ids), [later(span) for span in encoded.spans])


def control_token_in_text(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    text = next(span for span in encoded.spans if span.kind == "text")
    ids = list(encoded.input_ids)
    ids[text.start] = oracle.eos_id
    return EncodedRow.from_spans(ids, encoded.spans)


def another_text(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    text = next(span for span in reversed(encoded.spans) if span.kind == "text" and span.role == "assistant")
    ids = list(encoded.input_ids)
    ids[text.start] = oracle.encode_text("Three")[0]
    return EncodedRow.from_spans(ids, encoded.spans)


def call_without_its_marker(encoded: EncodedRow, oracle: Oracle) -> EncodedRow:
    spans: list[Span] = []
    for span in encoded.spans:
        if span.kind == "tool_call":
            marker = dataclasses.replace(span, end=span.start + 1, kind="control", supervised=False)
            spans += [marker, dataclasses.replace(span, start=span.start + 1)]
        else:
            spans.append(span)
    return EncodedRow.from_spans(encoded.input_ids, spans)


MUTANTS: dict[Mutate, str] = {
    shifted_by_one: "ML101",
    label_of_another_token: "ML101",
    labels_too_short: "ML101",
    a_hole_in_the_spans: "ML101",
    user_is_supervised: "ML102",
    bos_is_supervised: "ML102",
    nothing_is_supervised: "ML103",
    weight_is_ignored: "ML103",
    eos_is_masked: "ML104",
    eos_is_missing: "ML104",
    bos_twice: "ML105",
    control_token_in_text: "ML106",
    another_text: "ML109",
    call_without_its_marker: "ML110",
}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(shipped_tokenizer("spm-v3"))


def broken_rules(row: Row, encoded: EncodedRow, oracle: Oracle) -> set[str]:
    return {law.rule for law in LAWS if law.rule not in ("ML107", "ML108") and law.violation(row, encoded, oracle)}


def test_the_encoding_as_it_is_breaks_no_law(oracle: Oracle) -> None:
    assert broken_rules(ROW, oracle.encode(ROW), oracle) == set()


@pytest.mark.parametrize("mutate", MUTANTS, ids=lambda function: function.__name__)
def test_a_broken_encoding_is_caught(mutate: Mutate, oracle: Oracle) -> None:
    assert MUTANTS[mutate] in broken_rules(ROW, mutate(oracle.encode(ROW), oracle), oracle)


def test_the_second_mask_disagrees_with_a_broken_one(oracle: Oracle) -> None:
    row = parse_row({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    scan = next(law for law in LAWS if law.rule == "ML107")
    encoded = oracle.encode(row)
    assert scan.violation(row, encoded, oracle) == ""
    for mutate in (shifted_by_one, user_is_supervised, eos_is_masked, nothing_is_supervised):
        assert scan.violation(row, mutate(encoded, oracle), oracle) != ""


class _WeightsInTheText(Oracle):
    """Writes the weight of an answer into the prompt."""

    def encode(self, row: Row) -> EncodedRow:
        shown = tuple(
            {**message, "content": f"{message.get('content')}{message.get('weight', '')}"}
            if message["role"] == "assistant"
            else message
            for message in row.messages
        )
        return super().encode(Row(shown, row.tools))


class _Forgetful(Oracle):
    """Gives another encoding every time."""

    calls = 0

    def encode(self, row: Row) -> EncodedRow:
        type(self).calls += 1
        return nothing_is_supervised(super().encode(row), self) if self.calls % 2 else super().encode(row)


class _OtherPrompt(Oracle):
    """Asks at inference without the beginning of the row."""

    def encode_prompt(self, row: Row) -> tuple[int, ...]:
        return super().encode_prompt(row)[1:]


@pytest.mark.parametrize(
    ("broken", "rule"), [(_WeightsInTheText, "ML108"), (_Forgetful, "ML111"), (_OtherPrompt, "ML112")]
)
def test_a_broken_tokenization_is_found_and_shrunk(broken: type[Oracle], rule: str) -> None:
    oracle = broken(shipped_tokenizer("spm-v3"))
    law = next(law for law in LAWS if law.rule == rule)

    def finding(row: Row) -> Finding | None:
        violation = law.violation(row, oracle.encode(row), oracle)
        return Finding(rule, violation, row=row.to_jsonl()) if violation else None

    settings = Settings(30, None, "cpu", True, (), False, work_folder=None)  # type: ignore[arg-type]
    [found] = search(finding, _strategy(law, "v3"), settings)
    assert found.rule == rule
    assert len(found.row) < 200, "the row is not shrunk"
