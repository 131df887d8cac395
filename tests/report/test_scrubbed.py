"""A scrubbed row has no text of its user, and the form that its findings depend on."""

from __future__ import annotations

import doctest
import json
import re
from typing import Any

from hypothesis import given

from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.report import scrubbed
from pytest_mistral_lora.report.scrubbed import IdScrubber, Scrubber
from pytest_mistral_lora.strategies import rows

CALL = {
    "messages": [
        {"role": "user", "content": "Weather in Oslo, please: it is 12:30."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {
                    "id": "Ab3456789",
                    "type": "function",
                    "function": {"name": "lookup", "arguments": '{"town": "Oslo"}'},
                },
                {"id": "Ab3456780", "type": "function", "function": {"name": "lookup", "arguments": {"town": "Bodo"}}},
            ],
        },
        {"role": "tool", "tool_call_id": "Ab3456789", "content": "-7"},
        {"role": "tool", "tool_call_id": "Ab3456780", "content": "secret"},
        {"role": "assistant", "content": "Cold.", "weight": 0},
    ],
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "lookup",
                "description": "Looks it up.",
                "parameters": {
                    "type": "object",
                    "properties": {"town": {"type": "string", "maxLength": 40}, "type": {"type": "integer"}},
                    "required": ["town"],
                },
            },
        }
    ],
    "customer": {"name": "Alice", "role": "buyer", "number": 4711, "format": "gold"},
}


def texts_in(value: Any) -> set[str]:
    """Return the words of three letters or more of every text and key."""
    return {*re.findall(r"[^\W_]{3,}", json.dumps(value, ensure_ascii=False))}


def test_the_example_of_the_module_is_true() -> None:
    assert doctest.testmod(scrubbed).failed == 0


def test_a_text_keeps_its_form() -> None:
    scrub = Scrubber(Oracle(shipped_tokenizer("spm-v3"))).text
    assert scrub(" a\tB1\n[INST][OTHER]</s> ") == " x\tX0\n[INST][XXXXX]</s> "
    # one letter for each script, upper and lower case; marks, emoji and spaces stay
    assert scrub("Привет, ∑ 🙂\u00a0日本語") == "\u0425" + "\u0445" * 5 + ", ∑ 🙂\u00a0一一一"
    assert scrub("e\u0301") == "x\u0301"


def test_names_stay_equal_or_different_and_words_of_the_format_stay() -> None:
    row = Scrubber().row(CALL)
    _, calls, first, second, last = row["messages"]
    ids = [call["id"] for call in calls["tool_calls"]]
    assert [first["tool_call_id"], second["tool_call_id"]] == ids
    assert len({*ids}) == 2
    assert {len(name) for name in ids} == {9}
    function = row["tools"][0]["function"]
    assert {call["function"]["name"] for call in calls["tool_calls"]} == {function["name"]}
    [town] = function["parameters"]["required"]
    assert function["parameters"]["properties"][town] == {"type": "string", "maxLength": 40}
    assert json.loads(calls["tool_calls"][0]["function"]["arguments"]) == {town: "Xxxx"}
    assert calls["tool_calls"][1]["function"]["arguments"] == {town: "Xxxx"}
    assert (last["role"], last["weight"]) == ("assistant", 0)
    words = texts_in(row)
    private = {
        "Weather",
        "Oslo",
        "Bodo",
        "town",
        "lookup",
        "secret",
        "Cold",
        "Looks",
        "customer",
        "Alice",
        "buyer",
        "gold",
    }
    assert not words & {*private, "4711", "Ab3456789"}
    assert parse_rows({key: row[key] for key in ("messages", "tools")})


@given(rows())
def test_no_word_of_a_row_is_left_and_its_shape_stays(row: dict[str, Any]) -> None:
    scrubbed_row = Scrubber().row(row)
    assert [one["role"] for one in scrubbed_row["messages"]] == [one["role"] for one in row["messages"]]
    for before, after in zip(row["messages"], scrubbed_row["messages"], strict=True):
        assert before.keys() == after.keys()
        if isinstance(before.get("content"), str):
            assert len(before["content"]) == len(after["content"])
            assert not [
                letter for letter in after["content"] if letter.isascii() and letter.isalpha() and letter not in "xX"
            ] or (scrubbed._LIKE_CONTROL.search(before["content"]))


def test_ids_keep_their_control_tokens_lengths_and_labels() -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    messages = [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris."},
    ]
    encoded = oracle.encode({"messages": messages})
    ids, labels = [*encoded.input_ids], [*encoded.labels]
    given_row = {"messages": messages, "input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
    whole, alone = IdScrubber(oracle).encoded({**given_row, "text": "What is", "source": ["Wikipedia"]})
    assert alone.keys() == {"input_ids", "labels", "attention_mask"}
    assert (len(whole["input_ids"]), whole["labels"].count(-100)) == (len(ids), labels.count(-100))
    again = oracle.encode({"messages": whole["messages"]})
    assert (whole["input_ids"], whole["labels"]) == ([*again.input_ids], [*again.labels])
    assert {"What", "Paris", "capital"}.isdisjoint(texts_in(whole))
    # labels that are shifted stay shifted
    shifted = {"input_ids": ids, "labels": [*labels[1:], -100]}
    [row] = IdScrubber(oracle).encoded(shifted)
    assert row["labels"] == [*whole["labels"][1:], -100]
