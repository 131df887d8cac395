"""The shortcut for rows of plain texts gives what mistral-common's whole path gives: ids, labels, spans, refusals."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from each_oracle import LAYOUTS, NEWER, of_each, oracle_named
from encoding_laws import TOOL
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.encoder_trace import TextCache
from pytest_mistral_lora.chat.oracle.request import PlainRows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.strategies import hostile_text, rows, tool_rows

_TEXTS = st.one_of(
    hostile_text(), st.sampled_from(("5", "-0.5", "null", "[1]", " ", "\n", "text 1 of 2", "[INST]", ""))
)


@st.composite
def _any_turns(draw: st.DrawFn) -> dict[str, Any]:
    """Roles in any order, most of them in turn, with texts of any kind: many of the rows are refused."""
    roles = draw(st.lists(st.sampled_from(("system", "user", "assistant", "user", "assistant", "tool")), max_size=6))
    if draw(st.booleans()):
        roles = [*draw(st.sampled_from(([], ["system"]))), *["user", "assistant"] * draw(st.integers(1, 3))]
    messages: list[dict[str, Any]] = []
    for role in [*roles, "assistant"]:
        message: dict[str, Any] = {"role": role, "content": draw(_TEXTS)}
        if role == "assistant":
            message |= draw(st.sampled_from(({}, {}, {"weight": 0}, {"weight": 1}, {"tool_calls": []})))
        messages.append(message)
    # offered, and not called
    return {"messages": messages} | draw(st.sampled_from(({}, {}, {}, {"tools": [TOOL]})))


class _WholePath(PlainRows):
    def request(self, row: Row) -> Any:
        return None


@functools.cache
def both_of(name: str) -> tuple[Oracle, Oracle]:
    """An oracle, and the same one without the shortcut."""
    oracle = oracle_named(name)
    whole = copy.copy(oracle)
    whole._plain_rows = _WholePath(lambda row: None)
    return oracle, whole


def _outcome(oracle: Oracle, row: Row) -> EncodedRow | str:
    try:
        return oracle.encode(row)
    except OracleRejection as error:
        return str(error)


@settings(max_examples=12)
@given(data=st.one_of(_any_turns(), rows(), tool_rows()))
@example(data={"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]})
@example(data={"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "a"}]})
@example(data={"messages": [{"role": "assistant", "content": "a"}]})
@example(data={"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}], "tools": [TOOL]})
@of_each(*LAYOUTS, *NEWER, made=both_of)
def test_the_shortcut_changes_nothing(both: tuple[Oracle, Oracle], data: dict[str, Any]) -> None:
    row, (oracle, whole) = parse_row(data), both
    expected = _outcome(whole, row)
    # twice: the first row of a sequence makes its request, and the next one fills it
    assert _outcome(oracle, row) == expected
    assert _outcome(oracle, row) == expected
    if isinstance(expected, EncodedRow):
        assert oracle.reference(row) == expected.input_ids


@settings(max_examples=8)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=4, max_size=4))
@of_each(*LAYOUTS, *NEWER, made=both_of)
def test_a_row_leaves_nothing_to_the_next(both: tuple[Oracle, Oracle], texts: list[str]) -> None:
    oracle, whole = both
    for pair in (texts[:2], texts[2:]):
        messages = tuple(
            {"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)
        )
        assert oracle.encode(Row(messages)) == whole.encode(Row(messages))


@pytest.mark.parametrize("name", [*LAYOUTS, *NEWER])
def test_the_shortcut_is_taken(name: str) -> None:
    oracle, _ = both_of(name)
    roles = ("system", "user", "assistant", "user", "assistant")
    for texts in ("abcde", "vwxyz"):
        row = Row(tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=True)))
        assert oracle._plain_rows.request(row) is not None
    long = Row((*row.messages[:-1], {"role": "assistant", "content": "a" * 100_000}))
    assert oracle._plain_rows.request(long) is None


def test_sequences_are_bounded() -> None:
    def refused(row: Row) -> Any:
        raise ValueError(str(row.place))

    made = PlainRows(refused)
    for count in range(1, 600):
        messages = ({"role": "user", "content": "a"},) * count
        assert made.request(Row(messages)) is None
    assert len(made._shapes) <= 512


def test_texts_are_kept_within_bounds() -> None:
    asked: list[str] = []

    def encode(text: str, *, bos: bool, eos: bool) -> list[int]:
        asked.append(text)
        return [len(text)]

    known = TextCache(encode)
    assert [known["abc"], known["abc"], asked] == [(3,), (3,), ["abc"]]
    assert known["a" * 60_000] == (60_000,)
    assert [*known] == ["abc"]
    for number in range(30):
        assert known[f"{number:>040000}"] == (40_000,)
    assert sum(map(len, known)) <= 1_000_000
