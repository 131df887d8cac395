"""Rows in the forms of Axolotl and LLaMA-Factory come back as the same rows by their declarations."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imported import imported, written

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.formats.sources import rows_of
from pytest_mistral_lora.runners import HARNESS, TRAINERS
from pytest_mistral_lora.strategies import plain_text, rows, tool_rows

FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)

AXOLOTL_NAMES = {"system": "sys", "user": "me", "assistant": "bot", "tool": "fn"}


@FOLDER
@given(data=st.lists(rows(tools=None, weights=True, alternating=False, parallel=True), min_size=1, max_size=2))
def test_the_declared_keys_of_axolotl_come_back(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    records = []
    for row in data:
        turns = []
        for message in row["messages"]:
            other = {key: value for key, value in message.items() if key not in ("role", "content", "weight")}
            trained = {"train": message.get("weight") != 0} if message["role"] == "assistant" else {}
            said = {"what": message["content"]} if message.get("content") is not None else {}
            turns.append({"who": AXOLOTL_NAMES[message["role"]], **said, **other, **trained})
        records.append({"talk": turns, **({"functions": row["tools"]} if "tools" in row else {})})
    written(tmp_path / "talks.jsonl", *records)
    entry = {
        "path": "talks.jsonl",
        "type": "chat_template",
        "field_messages": "talk",
        "field_tools": "functions",
        "message_property_mappings": {"role": "who", "content": "what"},
        "message_field_training": "train",
        "roles": {ours: [theirs] for ours, theirs in AXOLOTL_NAMES.items()},
    }
    config = tmp_path / "axolotl.yaml"
    config.write_text(yaml.safe_dump({"base_model": "b", "datasets": [entry]}))
    found = list(rows_of(config))
    assert found == [parse_row(as_axolotl_reads(row)) for row in data]


def as_axolotl_reads(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose answers all have a weight, as a flag of training gives them, and whose chunks are one text."""
    messages = []
    for one in row["messages"]:
        message = {**one, "weight": one.get("weight", 1)} if one["role"] == "assistant" else dict(one)
        if one.get("content") is None:
            # of a call alone
            message.pop("content", None)
        elif isinstance(one["content"], list):
            message["content"] = "".join(chunk["text"] for chunk in one["content"])
        messages.append(message)
    return {**row, "messages": messages}


@pytest.fixture(scope="module")
def llamafactory_form() -> Iterator[Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]]:
    folders = [str(HARNESS), str(TRAINERS["llamafactory"].script.parent)]
    sys.path[:0] = folders
    pytest.importorskip("datasets", reason="the runners' own library")
    import llamafactory_rows

    yield lambda row, entry: llamafactory_rows._in_form({**row, llamafactory_rows.MARK: 0}, entry)
    del sys.path[: len(folders)]
    for name in ("llamafactory_rows", "harness"):
        sys.modules.pop(name, None)


SHAREGPT = {"formatting": "sharegpt", "columns": {"messages": "conversations", "tools": "tools"}}
OPENAI = {
    "formatting": "openai",
    "columns": {"messages": "messages", "tools": "tools"},
    "tags": {
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "function_tag": "function",
        "system_tag": "system",
    },
}


def kept(row: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of a row that LLaMA-Factory's forms have: no ids, names or empty contents of calls."""
    messages = []
    for one in row["messages"]:
        message = {"role": one["role"]}
        if one.get("tool_calls"):
            message["tool_calls"] = [
                {key: as_object(value) for key, value in call["function"].items()} for call in one["tool_calls"]
            ]
        else:
            message["content"] = one["content"]
        messages.append(message)
    return {"messages": messages, "tools": [tool["function"] for tool in row["tools"]]}


def as_object(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def is_json(row: dict[str, Any]) -> bool:
    """Return whether all arguments of a row are objects, or the JSON of one."""
    return all(
        isinstance(as_object(call["function"]["arguments"]), dict)
        for message in row["messages"]
        for call in message.get("tool_calls", ())
    )


@FOLDER
@pytest.mark.parametrize("entry", [SHAREGPT, OPENAI], ids=["sharegpt", "openai"])
@given(row=tool_rows(text=plain_text()).filter(is_json))
def test_the_forms_of_llamafactory_come_back(
    tmp_path: Path, llamafactory_form: Callable[..., Any], entry: dict[str, Any], row: dict[str, Any]
) -> None:
    for message in row["messages"]:
        # neither form has these
        message.pop("name", None)
    record = llamafactory_form(row, entry)
    written(tmp_path / "rows.jsonl", record)
    info = tmp_path / "dataset_info.json"
    info.write_text(json.dumps({"mine": {**entry, "file_name": "rows.jsonl"}}), "utf-8")
    (found,) = imported(info, "mine")
    assert kept(found) == kept(row)
    # each result answers a call
    asked = [call["id"] for message in found["messages"] for call in message.get("tool_calls", ())]
    assert entry is OPENAI or len(set(asked)) == len(asked)
    assert {message["tool_call_id"] for message in found["messages"] if message["role"] == "tool"} <= set(asked)
