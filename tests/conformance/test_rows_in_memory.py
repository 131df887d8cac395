"""A file of encoded rows and the same rows in memory have one verdict; only the source of a place differs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora import Verdict, audit
from pytest_mistral_lora.errors import InputError

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
SOUND = {**ROW, "input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [-100] * 4 + [23325, 2]}
PAIR = {
    "prompt": ROW["messages"][:1],
    "chosen": ROW["messages"][1:],
    "rejected": [{"role": "assistant", "content": "Bye"}],
    "prompt_ids": [1, 3, 16127, 4],
    "chosen_ids": [23325, 2],
    "rejected_ids": [1043, 29478, 2],
}
ODD_NUMBERS = (math.nan, math.inf, -math.inf, 1e308, 10**30, -(2**70), True, 1.5, -1, 32767, 32768, 0)


def written(value: Any) -> Any:
    """Return what JSON lacks as `json.dumps` takes it."""
    return value.tolist()


def verdict_of(verdict: Verdict) -> tuple[Any, ...]:
    """Return a verdict without the source of its places."""
    found = sorted(
        (
            finding.rule,
            finding.severity,
            finding.place.record or 0,
            finding.place.part,
            -1 if finding.place.token is None else finding.place.token,
            finding.found,
            finding.expected,
            str([place.part for place in finding.others]),
            finding.more,
        )
        for finding in verdict.findings
    )
    of_checks = (
        {name.partition("::")[2]: value for name, value in values.items()}
        for values in (verdict.not_checked, verdict.facts)
    )
    return verdict.ok, found, *of_checks


def assert_one_verdict(rows: list[dict[Any, Any]], folder: Path) -> None:
    file = folder / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row, default=written)}\n" for row in rows))
    assert verdict_of(audit(rows, tokenizer="spm-v3")) == verdict_of(audit(file, tokenizer="spm-v3"))


NUMBERS = st.one_of(
    st.sampled_from(ODD_NUMBERS),
    st.integers(-200, 33_000),
    st.sampled_from([numpy.int64(7), numpy.float32("nan"), numpy.float64(2.0), numpy.bool_(True), numpy.uint8(3)]),
)
SCALARS = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=4))
KEYS = st.one_of(st.text(max_size=4), st.integers(0, 3), st.booleans(), st.none(), st.sampled_from([1.5, math.nan]))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(KEYS, inner, max_size=3),
        st.sampled_from([numpy.array([[1, 2], [3, 4]]), numpy.array([1.0, math.nan]), numpy.array(5)]),
    ),
    max_leaves=6,
)


def as_given(ids: list[int], form: str) -> Any:
    """Return numbers as a trainer may have them."""
    if form == "objects":
        made = numpy.empty(len(ids), dtype=object)
        made[:] = [numpy.int64(number) for number in ids]
        return made
    return {"list": list, "tuple": tuple, "array": numpy.array}[form](ids)


@st.composite
def rows_of_a_trainer(draw: st.DrawFn) -> dict[Any, Any]:
    """Return a row, sound or not, of any types."""
    row: dict[Any, Any] = dict(draw(st.sampled_from([SOUND, SOUND, PAIR])))
    for key in [key for key, value in row.items() if value and isinstance(value[0], int)]:
        ids = list(row[key])
        if draw(st.integers(0, 3)) == 0:
            ids[draw(st.integers(0, len(ids) - 1))] = draw(st.sampled_from([*ids, -100, 7]))
        row[key] = as_given(ids, draw(st.sampled_from(["list", "tuple", "array", "objects"])))
    change = draw(st.integers(0, 5))
    keys = [*row, "attention_mask", "position_ids", "tools", "row", "conversations", "assistant_masks"]
    if change == 1:
        del row[draw(st.sampled_from([*row]))]
    elif change == 2:
        row[draw(st.sampled_from(keys))] = draw(VALUES)
    elif change == 3:
        row[draw(KEYS)] = draw(VALUES)
    elif change == 4:
        message = {"role": "user", "content": "Hi", draw(KEYS): draw(VALUES)}
        row["messages"] = (message, *ROW["messages"][1:])
    return row


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(rows_of_a_trainer(), min_size=1, max_size=3))
def test_a_file_and_the_same_rows_in_memory_have_one_verdict(rows: list[dict[Any, Any]], tmp_path: Path) -> None:
    assert_one_verdict(rows, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"x": math.nan},
        {"x": [{"y": -math.inf}]},
        {"x": {True: 1, None: 2, 3: 4, 1.5: 5}},
        {"x": {1: "a", "1": "b"}},
        {True: 1, "true": 2},
        {"labels": numpy.array([-100.0] * 4 + [23325, math.nan])},
        {"x": (1, (2, numpy.array([None, (3,)], dtype=object)))},
        {"input_ids": [1, 3, 16127, 4, 10**4000, 2]},
        {"x": "\ud800"},
        {"x": "\ud83d\ude00"},
    ],
    ids=str,
)
def test_values_that_json_lacks_are_those_of_a_line(change: dict[Any, Any], tmp_path: Path) -> None:
    assert_one_verdict([SOUND, SOUND | change], tmp_path)


def test_a_number_that_python_does_not_write_is_refused_as_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    number = "1" + "0" * 5000
    file.write_text(f'{json.dumps(SOUND)}\n{json.dumps(SOUND)[:-1]}, "x": [1, {number}]}}\n')
    in_file = verdict_of(audit(file, tokenizer="spm-v3"))
    assert verdict_of(audit([SOUND, SOUND | {"x": [1, 10**5000]}], tokenizer="spm-v3")) == in_file
    assert [finding[0] for finding in in_file[1]] == ["ML501"]


def test_a_row_is_measured_by_the_bytes_of_its_texts() -> None:
    # a third of the limit in UTF-8, and two thirds of it with escapes
    large = SOUND | {"x": "\u20ac" * (5 << 20)}
    assert audit([large], tokenizer="spm-v3").ok
    with_more = audit([SOUND | {"x": "\u20ac" * (7 << 20)}], tokenizer="spm-v3")
    assert [finding.rule for finding in with_more.findings] == ["ML501"]


def test_a_value_that_no_line_can_have_is_refused() -> None:
    with pytest.raises(InputError, match=r"rows\[0\]"):
        audit([SOUND | {"x": {1, 2}}], tokenizer="spm-v3")
