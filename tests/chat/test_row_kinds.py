"""A record's kind is shown by its keys, and a record without one is refused as a conversation is."""

from __future__ import annotations

import pytest

from pytest_mistral_lora.chat.row_kinds import CONVERSATION, ROW_KINDS, parse_rows, record_kind
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import Place

TURNS = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Red."}]


def test_a_conversation_stands_for_one_row():
    data = {"messages": TURNS, "source": "my own key"}
    assert record_kind(data) is CONVERSATION
    [row] = parse_rows(data, place=Place.of("rows.jsonl", 3))
    assert row == Row.from_dict(data)
    assert str(row.place) == "rows.jsonl:3"


@pytest.mark.parametrize("data", [None, [], "text", {}, {"messages": None}, {"message": TURNS}])
def test_a_record_of_no_kind_is_refused_as_a_conversation(data):
    assert record_kind(data) is CONVERSATION
    with pytest.raises(RowError) as error:
        parse_rows(data, place=Place.of("rows.jsonl", 3))
    assert str(error.value.place).startswith("rows.jsonl:3")


def test_messages_decide_the_kind_whatever_stands_beside_them():
    keys = ("prompt", "chosen", "rejected", "completion", "label", "suffix")
    assert record_kind({"messages": TURNS, **{key: [] for key in keys}}) is CONVERSATION


def test_kinds_have_their_names():
    assert {name: kind.name for name, kind in ROW_KINDS.items()} == {name: name for name in ROW_KINDS}
