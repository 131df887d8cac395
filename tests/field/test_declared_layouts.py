"""Each form that LLaMA-Factory and Axolotl declare gives the rows that they train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from imported import ANSWER, GOOD, SYSTEM, USER, axolotl, declared_rows, llamafactory

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


OF_LLAMAFACTORY: list[tuple[str, dict[str, Any], Any, Any]] = [
    (
        "alpaca",
        {},
        {"instruction": "u", "input": "v", "output": "a"},
        {"messages": [{**USER, "content": "u\nv"}, ANSWER]},
    ),
    (
        "columns of another name",
        {"columns": {"prompt": "q", "response": "r", "system": "s", "history": "h"}},
        {"q": "u", "r": "a", "s": "s", "h": [["b", "c"]]},
        {"messages": [SYSTEM, {**USER, "content": "b"}, {**ANSWER, "content": "c"}, USER, ANSWER]},
    ),
    (
        # a column that is not declared beside others is not read
        "an input that is not declared",
        {"columns": {"prompt": "instruction", "response": "output"}},
        {"instruction": "u", "input": "x", "output": "a"},
        GOOD | {"input": "x"},
    ),
    (
        "sharegpt with tools",
        {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools", "system": "sys"}},
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "f", "parameters": {}}]',
            "sys": "s",
        },
        {
            "messages": [
                SYSTEM,
                USER,
                {
                    "role": "assistant",
                    "tool_calls": [{"id": "ID", "type": "function", "function": {"name": "f", "arguments": {}}}],
                },
                {"role": "tool", "content": "1", "tool_call_id": "ID"},
                ANSWER,
            ],
            "tools": [TOOL],
        },
    ),
    (
        "tags",
        {
            "formatting": "sharegpt",
            "columns": {"messages": "turns"},
            "tags": {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "bot"},
        },
        {"turns": [{"who": "me", "says": "u"}, {"who": "bot", "says": "a"}]},
        GOOD,
    ),
    (
        "openai",
        {
            "formatting": "openai",
            "columns": {"messages": "messages"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        GOOD,
        GOOD,
    ),
    (
        "pairs of sharegpt",
        {
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {"messages": "conversations", "chosen": "good", "rejected": "bad"},
        },
        {
            "conversations": [{"from": "human", "value": "u"}],
            "good": {"from": "gpt", "value": "a"},
            "bad": {"from": "gpt", "value": "b"},
        },
        GOOD,
    ),
    (
        "pairs of alpaca",
        {"ranking": True, "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}},
        {"instruction": "u", "chosen": "a", "rejected": "b"},
        GOOD,
    ),
    (
        "kto",
        {
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "kto_tag": "good"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        GOOD | {"good": False},
        None,
    ),
]


def with_ids(row: Any) -> Any:
    return json.loads(json.dumps(row), object_hook=_named)


def _named(one: dict[str, Any]) -> dict[str, Any]:
    return {key: "ID" if key in ("id", "tool_call_id") else value for key, value in one.items()}


@pytest.mark.parametrize(("name", "entry", "record", "row"), OF_LLAMAFACTORY, ids=[case[0] for case in OF_LLAMAFACTORY])
def test_a_dataset_info_of_llamafactory(tmp_path: Path, name: str, entry: Any, record: Any, row: Any) -> None:
    found, report = declared_rows(llamafactory(tmp_path, entry, record))
    assert with_ids(found) == ([] if row is None else [row])
    assert report.sources[0]["format"].endswith("(declared)")


OF_AXOLOTL: list[tuple[str, dict[str, Any], Any, Any]] = [
    ("chat_template", {"type": "chat_template"}, GOOD, GOOD),
    (
        "mappings",
        {
            "type": "chat_template",
            "field_messages": "turns",
            "field_system": "sys",
            "field_tools": "functions_of_mine",
            "message_property_mappings": {"role": "from", "content": "value"},
            "roles": {"user": ["me"], "assistant": ["bot"]},
        },
        {
            "turns": [{"from": "me", "value": "u"}, {"from": "bot", "value": "a"}],
            "sys": "s",
            "functions_of_mine": [TOOL],
        },
        {"messages": [SYSTEM, USER, ANSWER], "tools": [TOOL]},
    ),
    (
        "the old names of the mappings",
        {"type": "chat_template", "message_field_role": "from", "message_field_content": "value"},
        {"messages": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        GOOD,
    ),
    (
        "a flag of training",
        {"type": "chat_template", "message_field_training": "learn"},
        {"messages": [USER, {**ANSWER, "learn": False}]},
        {"messages": [USER, {**ANSWER, "weight": 0}]},
    ),
    (
        "only flagged answers are trained on",
        {"type": "chat_template", "roles_to_train": [], "message_field_training": "learn"},
        {"messages": [USER, ANSWER, USER, {**ANSWER, "learn": True}]},
        {"messages": [USER, {**ANSWER, "weight": 0}, USER, {**ANSWER, "weight": 1}]},
    ),
    (
        "thinking and parts",
        {"type": "chat_template", "field_thinking": "why"},
        {
            "messages": [
                USER,
                {"role": "assistant", "why": "t", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            ]
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "ab"}],
                },
            ]
        },
    ),
    ("no system", {"type": "chat_template", "drop_system_message": True}, {"messages": [SYSTEM, USER, ANSWER]}, GOOD),
    (
        "sharegpt",
        {"type": "sharegpt"},
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        GOOD,
    ),
    ("alpaca", {"type": "alpaca"}, {"instruction": "u", "input": "", "output": "a"}, GOOD),
    ("gpteacher", {"type": "gpteacher"}, {"instruction": "u", "input": "", "response": "a"}, GOOD),
    ("questions", {"type": "alpaca_chat.load_qa"}, {"question": "u", "answer": "a"}, GOOD),
    (
        "fields of one's own",
        {
            "type": {
                "system_prompt": "s",
                "field_instruction": "q",
                "field_output": "r",
                "format": "[Q] {instruction} ({input})",
                "no_input_format": "[Q] {instruction}",
            }
        },
        {"q": "u", "r": "a"},
        {"messages": [SYSTEM, {**USER, "content": "[Q] u"}, ANSWER]},
    ),
]


@pytest.mark.parametrize(("name", "entry", "record", "row"), OF_AXOLOTL, ids=[case[0] for case in OF_AXOLOTL])
def test_a_configuration_of_axolotl(tmp_path: Path, name: str, entry: Any, record: Any, row: Any) -> None:
    found, _ = declared_rows(axolotl(tmp_path, entry, record))
    assert found == [row]
