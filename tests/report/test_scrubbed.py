"""A scrubbed row has no text of its user, and the form that its findings depend on."""

from __future__ import annotations

import doctest
import json
import re
from typing import Any

import pytest
from hypothesis import given

from pytest_mistral_lora import audit
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.report import scrubbed
from pytest_mistral_lora.report.scrubbed import Scrubber
from pytest_mistral_lora.report.scrubbed_ids import IdScrubber
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


@pytest.fixture(scope="module", params=["spm-v1", "spm-v3", "tekken-240911"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    return Oracle(shipped_tokenizer(request.param))


def encoded(oracle: Oracle, row: dict[str, Any]) -> dict[str, Any]:
    made = oracle.encode(row)
    return {"input_ids": [*made.input_ids], "labels": [*(made.labels or ())]}


CHAT = {
    "messages": [
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris, on the Seine."},
        {"role": "user", "content": "And of Norway?"},
        {"role": "assistant", "content": "Oslo."},
    ]
}


@pytest.mark.parametrize("has_messages", [True, False])
def test_a_sound_encoded_row_is_sound_without_its_texts(has_messages: bool, oracle: Oracle) -> None:
    rows_of = [CHAT, *([{key: CALL[key] for key in ("messages", "tools")}] if oracle.tool_calls_id else [])]
    for row in rows_of:
        ids = encoded(oracle, row)
        mask = {"attention_mask": [1] * len(ids["input_ids"]), "text": "What is", "source": ["Wikipedia"]}
        moved, *others = IdScrubber(oracle).encoded({**(row if has_messages else {}), **ids, **mask})
        assert moved.keys() == {*(row if has_messages else ()), "input_ids", "labels", "attention_mask"}
        assert {len(value) for key, value in moved.items() if key not in row} == {len(moved["input_ids"])}
        assert audit([moved], tokenizer=oracle.path).ok
        for made in (moved, *others):
            spelled = oracle.decode(made["input_ids"]) + json.dumps(made)
            assert not {"What", "Paris", "capital", "Norway", "Weather", "Oslo", "lookup", "Wikipedia"} & texts_in(
                spelled
            )


FAULTS = {
    "the EOS of an earlier answer is masked": lambda ids, labels, end: (ids, [*labels[:end], -100, *labels[end + 1 :]]),
    "labels are shifted": lambda ids, labels, end: (ids, [*labels[1:], -100]),
    "the prompt is trained on": lambda ids, labels, end: (ids, ids),
    "there is no BOS": lambda ids, labels, end: (ids[1:], labels[1:]),
    "an EOS is missing": lambda ids, labels, end: (ids[:end] + ids[end + 1 :], labels[:end] + labels[end + 1 :]),
    "the end is cut": lambda ids, labels, end: (ids[:-1], labels[:-1]),
    "nothing is trained on": lambda ids, labels, end: (ids, [-100] * len(ids)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("row", ["chat", "call"])
def test_a_broken_encoded_row_has_its_findings_without_its_texts(row: str, fault: str) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    messages = CHAT if row == "chat" else {key: CALL[key] for key in ("messages", "tools")}
    ids, labels = encoded(oracle, messages).values()
    ids, labels = FAULTS[fault](ids, labels, ids.index(oracle.eos_id))
    for given_messages in (messages, {}):
        broken = {**given_messages, "input_ids": ids, "labels": labels}
        found = {finding.rule for finding in audit([broken], tokenizer="spm-v3").findings}
        assert found
        kept = [
            {finding.rule for finding in audit([made], tokenizer="spm-v3").findings}
            for made in IdScrubber(oracle).encoded(broken)
        ]
        assert found <= set[str]().union(*kept)


def test_packed_rows_keep_their_lengths_and_positions() -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    ids, labels = encoded(oracle, CHAT).values()
    packed = {"input_ids": ids * 2, "labels": labels * 2, "position_ids": [*range(len(ids))] * 2}
    [made] = IdScrubber(oracle).encoded(packed)
    assert made["position_ids"] == packed["position_ids"]
    assert [len(made[key]) for key in ("input_ids", "labels")] == [len(ids) * 2] * 2
    assert {*oracle.decode(made["input_ids"]).split()} == {"x"}
