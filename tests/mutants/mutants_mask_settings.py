"""Rows of the newest tokenizers: thinking, settings, results in chunks."""

from __future__ import annotations

import json
from collections.abc import Callable

from bench_mask import QUESTION, TOOL, Made, weather_call
from gallery import Artifact, mutant


def thinking_row() -> Made:
    """A row with all that only the newest tokenizers encode: thinking, an effort, a schema, a result in chunks."""
    thought, text = {"type": "thinking", "thinking": "Rome is one."}, {"type": "text", "text": "It is mild."}
    result = [{"type": "text", "text": "12"}, {"type": "text", "text": " degrees"}]
    schema = {"type": "object", "properties": {"unit": {"type": "string"}, "city": {"type": "string"}}}
    messages = [
        QUESTION,
        {"role": "assistant", "tool_calls": [weather_call("call_1", "Rome")]},
        {"role": "tool", "tool_call_id": "call_1", "content": result},
        {"role": "assistant", "content": [thought, text]},
    ]
    asked = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    return {"messages": messages, "tools": [TOOL], "reasoning_effort": "high", "response_format": asked}


def of_newest(artifact: Artifact, before: Callable[[Made], Made]) -> None:
    """Encode a row with thinking and settings by the newest version, after a change."""
    artifact["tokenizer"], artifact["row"] = artifact["newest_tokenizer"], thinking_row()
    artifact["before"] = before


def with_ids_in_names(row: Made) -> Made:
    """Write the id of each call behind its name."""
    row = json.loads(json.dumps(row))
    for call in (call for message in row["messages"] for call in message.get("tool_calls", ())):
        call["function"]["name"] += f"-{call['id']}"
    return row


def first_chunks(row: Made) -> Made:
    """Keep the first chunk of each tool result."""
    messages = [
        message | {"content": message["content"][:1]} if message["role"] == "tool" else message
        for message in row["messages"]
    ]
    return row | {"messages": messages}


def thinking_as_text(row: Made) -> Made:
    """Encode each thought as a text of the answer."""
    row = json.loads(json.dumps(row))
    for message in row["messages"]:
        for chunk in message["content"] if isinstance(message.get("content"), list) else ():
            if chunk["type"] == "thinking":
                chunk.update(type="text", text=chunk.pop("thinking"))
    return row


def left_open(row: Made) -> Made:
    """Leave each thought open."""
    row = json.loads(json.dumps(row))
    for message in row["messages"]:
        for chunk in message["content"] if isinstance(message.get("content"), list) else ():
            if chunk["type"] == "thinking":
                chunk["closed"] = False
    return row


def without(row: Made, key: str) -> Made:
    """Leave out a key of a row."""
    return {name: value for name, value in row.items() if name != key}


@mutant("ML107 ML112")
def _ids_of_calls_are_written(artifact: Artifact) -> None:
    """The id of each call is written behind its name, as version 11 has it in a place of its own."""
    of_newest(artifact, with_ids_in_names)


@mutant("ML107 ML112 ML123", says="'12 degrees' is in no turn of a tool")
def _the_first_chunk_of_a_result(artifact: Artifact) -> None:
    """Of a result in chunks, the first is encoded."""
    of_newest(artifact, first_chunks)


@mutant("ML107 ML112")
def _the_effort_is_left_out(artifact: Artifact) -> None:
    """A trainer knows messages and tools, and leaves the other keys of a row out."""
    of_newest(artifact, lambda row: without(row, "reasoning_effort"))


@mutant("ML107 ML112")
def _the_schema_is_left_out(artifact: Artifact) -> None:
    """The response format of a row is left out."""
    of_newest(artifact, lambda row: without(row, "response_format"))


@mutant("ML107 ML125", says="has the markers none")
def _thinking_is_text(artifact: Artifact) -> None:
    """Thinking is encoded as the beginning of the answer."""
    of_newest(artifact, thinking_as_text)


@mutant("ML107 ML125", says="has the markers [THINK]; its chunks have [THINK] [/THINK]")
def _thinking_never_ends(artifact: Artifact) -> None:
    """The end of each thought is left out."""
    of_newest(artifact, left_open)
