from __future__ import annotations

from typing import Any, get_args

import pytest
from each_oracle import oracle_named
from hypothesis import given
from hypothesis import strategies as st

from pytest_mistral_lora.chat.encoded import (
    DROPPED,
    IGNORE_INDEX,
    EncodedRow,
    Policy,
    PolicyResult,
    Truncation,
    Unsupervised,
)
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import rows

ORACLE = Oracle(shipped_tokenizer("spm-v3"))
POLICIES = [(cut, silent) for cut in get_args(Truncation) for silent in get_args(Unsupervised)]


def row(*weights: int) -> Row:
    turns = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c", "weight": one}] for one in weights
    ]
    return Row(tuple(message for turn in turns for message in turn), place=Place.of("rows.jsonl", 7))


def faults(policy: Policy, one: Row) -> list[str]:
    return [name for name, _ in policy.faults(ORACLE.encode(one), one)]


@given(rows(tools=None, weights=True), st.data())
def test_a_cut_row_is_the_beginning_of_the_row_and_nothing_else(one: Any, data: st.DataObject) -> None:
    whole = ORACLE.encode(one)
    length = data.draw(st.integers(1, len(whole.input_ids)))
    cut = whole.cut(length)
    assert (cut.input_ids, cut.labels) == (whole.input_ids[:length], (whole.labels or ())[:length])
    assert cut == EncodedRow.from_spans(cut.input_ids, cut.spans)
    ends = [(span.start, span.end) for span in cut.spans]
    assert [start for start, _ in ends] == [0, *(end for _, end in ends[:-1])]
    assert ends[-1][1] == length
    assert cut.supervised_tokens == sum(label != IGNORE_INDEX for label in cut.labels or ())


@given(rows(tools=None, weights=True), st.integers(1, 80), st.sampled_from(POLICIES))
def test_a_row_is_refused_or_what_is_left_of_it_is_accounted_for(
    one: Any, length: int, chosen: tuple[Any, Any]
) -> None:
    policy, one = Policy(length, *chosen), parse_row(one)
    whole = ORACLE.encode(one)
    if any(policy.faults(whole, one)):
        return
    kept = policy.apply(whole)
    if kept.encoded is None:
        assert set(kept.changes) <= set(DROPPED)
        assert len(kept.changes) == 1
        return
    assert len(kept.encoded.input_ids) <= length
    assert kept.encoded == whole.cut(length)
    assert ("cut" in kept.changes) == (len(whole.input_ids) > length)
    assert ("without-loss" in kept.changes) == (kept.encoded.supervised_tokens == 0)


@pytest.mark.parametrize(("truncation", "unsupervised"), POLICIES)
def test_a_row_that_fits_and_teaches_is_left_as_it_is(truncation: Any, unsupervised: Any) -> None:
    whole = ORACLE.encode(row(1))
    policy = Policy(len(whole.input_ids), truncation, unsupervised)
    assert faults(policy, row(1)) == []
    assert policy.apply(whole) == PolicyResult(whole)


def test_a_long_row_is_refused_dropped_or_cut() -> None:
    whole = ORACLE.encode(row(1))
    length = len(whole.input_ids) - 1
    assert faults(Policy(length), row(1)) == ["too-long"]
    assert Policy(length, "drop").apply(whole) == PolicyResult(None, ("too-long",))
    kept = Policy(length, "right").apply(whole)
    assert kept == PolicyResult(whole.cut(length), ("cut",))
    assert kept.encoded is not None
    assert whole.input_ids[-1] == ORACLE.eos_id
    assert ORACLE.eos_id not in kept.encoded.input_ids
    assert ORACLE.eos_id not in (kept.encoded.labels or ())
    assert "eos" not in {span.kind for span in kept.encoded.spans}


def test_a_row_that_teaches_nothing_is_refused_dropped_or_kept() -> None:
    whole = ORACLE.encode(row(0))
    assert faults(Policy(99), row(0)) == ["nothing-supervised"]
    assert faults(Policy(99, "error", "warn"), row(0)) == []
    assert Policy(99, "error", "drop").apply(whole) == PolicyResult(None, ("nothing-supervised",))
    assert Policy(99, "error", "warn").apply(whole) == PolicyResult(whole, ("without-loss",))


def test_an_answer_that_v2_leaves_out_is_told_apart_from_one_of_weight_zero() -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "1", "tool_call_id": "abcdefghi"}]
    one = Row(({"role": "user", "content": "a"}, *turns, *row(0).messages))
    for name, faulty in (("spm-v2", True), ("spm-v3", False)):
        found = [str(error) for _, error in Policy(99).faults(oracle_named(name).encode(one), one)]
        assert ["no token of an answer of weight 1" in error for error in found] == [True] * faulty
    assert ["weight 0" in str(error) for _, error in Policy(99).faults(ORACLE.encode(row(0)), row(0))] == [True]


def test_a_cut_that_leaves_no_label_counts_as_a_row_that_teaches_nothing() -> None:
    whole = ORACLE.encode(row(1))
    prompt = (whole.labels or ()).count(IGNORE_INDEX)
    [(name, error)] = Policy(prompt, "right").faults(whole, row(1))
    assert name == "nothing-supervised"
    assert str(error.place) == "rows.jsonl:7"
    assert f" {prompt} of {len(whole.input_ids)}" in error.found
    assert Policy(prompt, "right", "drop").apply(whole) == PolicyResult(None, ("nothing-supervised",))
    assert Policy(prompt, "right", "warn").apply(whole) == PolicyResult(whole.cut(prompt), ("cut", "without-loss"))
    # a row that is dropped for its length is dropped for that
    assert faults(Policy(prompt, "drop"), row(1)) == []


def test_a_row_without_labels_is_always_refused() -> None:
    whole = ORACLE.encode(row(1))
    unlabelled = EncodedRow(whole.input_ids, None, ())
    for chosen in POLICIES:
        assert next(iter(Policy(99, *chosen).faults(unlabelled, row(1))))[0] == "no-labels"
