"""A row in memory: its line of JSON, its turns, and the text of its contents."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.likeness import conversation_numbers
from pytest_mistral_lora.chat.rows import Row, text_of, weight_of
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import rows

MESSAGES = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@given(data=rows(tools=None, weights=True, alternating=False))
def test_a_row_survives_its_own_line(data: dict[str, Any]) -> None:
    row = parse_row(data)
    assert as_row(row) is row
    assert "\n" not in row.to_jsonl()
    assert row.to_json() == data
    assert parse_row(json.loads(row.to_jsonl())) == row


@given(data=rows(weights=True, alternating=False))
def test_assistant_groups_are_runs_of_equal_weight(data: dict[str, Any]) -> None:
    messages = parse_row(data).messages
    groups = parse_row(data).assistant_groups()
    assert [i for group in groups for i in group] == [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    for group in groups:
        assert group == list(range(group[0], group[-1] + 1))
        assert len({weight_of(messages[index]) for index in group}) == 1
    for one, two in itertools.pairwise(groups):
        assert one[-1] + 1 < two[0] or weight_of(messages[one[0]]) != weight_of(messages[two[0]])


def test_the_place_of_a_row_is_not_part_of_it() -> None:
    row = {"messages": MESSAGES}
    assert (
        parse_row(row, place=Place.of("a", 1))
        == parse_row(row, place=Place.of("b", 2))
        != parse_row({"messages": MESSAGES[1:]})
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, ""),
        ("x", "x"),
        ([], ""),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": ""}, {"type": "text", "text": "b"}], "a\n\nb"),
    ],
)
def test_the_text_of_a_content(content: Any, text: str) -> None:
    assert text_of(content) == text


@pytest.mark.parametrize(
    ("role", "step"),
    [
        ("asistant", "Did you mean 'assistant'?"),
        ("Assistant", "Did you mean 'assistant'?"),
        ("bot", "Did you mean 'assistant'?"),
        ("usr", "Did you mean 'user'?"),
        ("sytem", "Did you mean 'system'?"),
        ("xyzzy", ""),
        (5, ""),
    ],
)
def test_a_role_that_does_not_exist_asks_for_the_one_that_is_meant(role: object, step: str) -> None:
    with pytest.raises(RowError) as refused:
        Row.from_dict({"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert refused.value.next_step == step


def talk(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]}


def monologue(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": text}]}


@pytest.mark.parametrize(
    ("talks", "numbers"),
    [
        ([talk("q", "a"), talk("q", "a"), talk("Q ", "a.")], [0, 0, 0]),
        ([talk("q", "a"), talk("q", "b"), talk("p", "a")], [0, 0, 1]),
        ([talk(*"12345678"[:turns]) for turns in (2, 8, 6, 4)], [0, 0, 0, 0]),
        # a first turn is that of one of the talks that begin with it, and does not join them
        ([talk("hi", "x", "b", "c"), talk("hi", "x", "d", "e")], [0, 1]),
        ([monologue("a"), monologue("b")], [0, 1]),
    ],
    ids=["copies", "answers", "turns", "greeting", "no question"],
)
def test_each_row_has_the_number_of_its_conversation(talks: list[dict[str, Any]], numbers: list[int]) -> None:
    assert conversation_numbers(map(parse_row, talks)) == numbers


def test_a_row_that_two_others_go_on_with_joins_the_same_in_any_order() -> None:
    talks = [parse_row(talk(*texts)) for texts in (("hi", "x"), ("hi", "x", "b", "c"), ("hi", "x", "d", "e"))]
    joined = set()
    for order in itertools.permutations(talks):
        numbers = dict(zip((row.to_jsonl() for row in order), conversation_numbers(order), strict=True))
        first, *others = (numbers[row.to_jsonl()] for row in talks)
        joined.add(tuple(first == other for other in others))
    assert joined in ({(True, False)}, {(False, True)})
