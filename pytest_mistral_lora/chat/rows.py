"""Chat rows: one conversation each, checked field by field before anything is encoded.

A row is `{"messages": [{"role": …, "content": …}, …], "tools": […]}`. Other keys of a row are the user's own;
unknown keys of a *message* are refused, since a misspelt `weight` or `tool_calls` would train on something else.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.jsonl import scan_jsonl
from pytest_mistral_lora.errors import RowError, RowsError

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "tool_calls", "weight"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
_ROW_KEYS = ("messages", "tools")
_NOT_TEXT = {
    "image": "image",
    "image_url": "image",
    "input_audio": "audio",
    "audio": "audio",
    "audio_url": "audio",
    "thinking": "thinking",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation, already checked.

    Attributes:
        messages: The messages as plain JSON data, in order.
        tools: Function tools in the OpenAI layout, or None.
        place: Where the row came from (`file:line`), for messages; empty for a row made in code.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    place: str = field(default="", compare=False)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON data, fit for one line of a dataset."""
        data: dict[str, Any] = {"messages": [dict(message) for message in self.messages]}
        if self.tools:
            data["tools"] = [dict(tool) for tool in self.tools]
        return data

    def to_jsonl(self) -> str:
        """Return the row as one line that can be pasted into a dataset."""
        return json.dumps(self.to_json(), ensure_ascii=False)

    def assistant_groups(self) -> list[list[int]]:
        """Group the indices of the assistant messages that one encoded turn is made of.

        Consecutive assistant messages of equal weight are one turn, as in mistral-common's normaliser.
        """
        groups: list[list[int]] = []
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            joins = groups and groups[-1][-1] == index - 1 and weight_of(self.messages[index - 1]) == weight_of(message)
            if joins:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups


def weight_of(message: Mapping[str, Any]) -> int:
    """Return 1 if an assistant message is trained on, else 0 (mistral-finetune's `weight`; 1 by default)."""
    weight = message.get("weight")
    return 1 if weight is None else int(weight)


def text_of(content: Any) -> str:
    """Return the text of a checked `content`: a string, or text chunks joined as mistral-common joins them."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n\n".join(chunk["text"] for chunk in content if chunk["text"])


def scan_rows(path: str | Path) -> Iterator[Row | RowError]:
    """Yield each row of a JSONL file, or the error that makes it unusable, in file order and one at a time.

    Raises:
        InputError: If the file cannot be opened.
    """
    path = Path(path)
    for item in scan_jsonl(path):
        if isinstance(item, RowError):
            yield item
            continue
        number, data = item
        try:
            yield parse_row(data, place=f"{path}:{number}")
        except RowError as error:
            yield error


def read_rows(path: str | Path) -> Iterator[Row]:
    """Yield the rows of a JSONL file.

    Raises:
        InputError: If the file cannot be opened.
        RowsError: After the last row, if any row was bad: it lists every bad row. Nothing is dropped silently.
    """
    errors: list[RowError] = []
    found = 0
    for item in scan_rows(path):
        if isinstance(item, RowError):
            errors.append(item)
        else:
            found += 1
            yield item
    if not errors and not found:
        errors.append(RowError("the file has no rows", place=str(path)))
    if errors:
        raise RowsError(errors, place=str(path))


def as_row(row: Row | Mapping[str, Any]) -> Row:
    """Return a `Row` for a row given as a `Row` or as plain JSON data.

    Raises:
        RowError: If the data is not a row.
    """
    return row if isinstance(row, Row) else parse_row(row)


def parse_row(data: Any, *, place: str = "") -> Row:
    """Check plain JSON data and return it as a `Row`.

    Raises:
        RowError: With the field and the value, if the data is not a row.
    """
    if not isinstance(data, Mapping):
        raise RowError(f"a row is {_kind(data)}", place=place, expected='an object with "messages"')
    _refuse_near_misses(data, place)
    messages = data.get("messages")
    if messages is None:
        raise RowError('no "messages"', place=place, expected='a list under "messages"')
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError(f"messages is {_kind(messages)}", place=place, expected="a list")
    if not messages:
        raise RowError("messages is empty", place=place, expected="at least one user and one assistant message")
    for index, message in enumerate(messages):
        _check_message(message, _Place(place, f"messages[{index}]"))
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError(
            "no assistant message", place=_Place(place, "messages").text, expected="a turn that can be trained on"
        )
    tools = data.get("tools")
    if tools is not None:
        _check_tools(tools, _Place(place, "tools"))
    return Row(tuple(messages), tuple(tools) if tools else None, place)


@dataclass(frozen=True, slots=True)
class _Place:
    """A field of a row in a file."""

    origin: str
    path: str

    def __truediv__(self, step: str | int) -> _Place:
        return _Place(self.origin, f"{self.path}[{step}]" if isinstance(step, int) else f"{self.path}.{step}")

    @property
    def text(self) -> str:
        return f"{self.origin}, {self.path}" if self.origin else self.path

    def error(self, found: str, expected: str = "", next_step: str = "") -> RowError:
        return RowError(found, place=self.text, expected=expected, next_step=next_step)


def _refuse_near_misses(data: Mapping[str, Any], place: str) -> None:
    for key in data:
        if not isinstance(key, str):
            raise RowError(f"the key {key!r} is not a string", place=place)
        near = difflib.get_close_matches(key.lower(), _ROW_KEYS, n=1, cutoff=0.8)
        if near and key not in _ROW_KEYS:
            raise RowError(f"unknown key {key!r}", place=place, expected=f"{near[0]!r}, or a name unlike it")


def _check_message(message: Any, place: _Place) -> None:
    if not isinstance(message, Mapping):
        raise place.error(f"is {_kind(message)}", 'an object with "role" and "content"')
    role = message.get("role")
    if role not in ROLES:
        found = "is missing" if "role" not in message else repr(role)
        raise (place / "role").error(found, "one of " + ", ".join(ROLES))
    for key, value in message.items():
        if key not in _MESSAGE_KEYS[role] and value is not None:
            known = ", ".join(sorted(_MESSAGE_KEYS[role]))
            raise (place / str(key)).error(f"unknown field of a message with role {role!r}", f"one of {known}")
    tool_calls = message.get("tool_calls")
    _check_content(message, place / "content", optional=bool(tool_calls))
    if tool_calls is not None:
        _check_tool_calls(tool_calls, place / "tool_calls")
    _check_weight(message.get("weight"), place / "weight")
    for key in ("tool_call_id", "name"):
        if message.get(key) is not None:
            _check_text(message[key], place / key)


def _check_content(message: Mapping[str, Any], place: _Place, *, optional: bool) -> None:
    content = message.get("content")
    if content is None:
        if not optional:
            raise place.error("is null" if "content" in message else "is missing", "a string or a list of text chunks")
    elif isinstance(content, str):
        _check_text(content, place)
    elif isinstance(content, Sequence):
        for index, chunk in enumerate(content):
            _check_chunk(chunk, place / index)
    else:
        raise place.error(f"is {_kind(content)}", "a string or a list of text chunks")


def _check_chunk(chunk: Any, place: _Place) -> None:
    if not isinstance(chunk, Mapping):
        raise place.error(f"is {_kind(chunk)}", 'a chunk: {"type": "text", "text": …}')
    kind = chunk.get("type")
    if isinstance(kind, str) and kind in _NOT_TEXT:
        raise place.error(f"{_NOT_TEXT[kind]} chunk (type {kind!r})", "text only", "This suite checks and trains text.")
    if kind != "text":
        raise (place / "type").error("is missing" if "type" not in chunk else repr(kind), "'text'")
    for key in chunk:
        if key not in ("type", "text"):
            raise (place / str(key)).error("unknown field of a text chunk", "type and text")
    if not isinstance(chunk.get("text"), str):
        raise (place / "text").error(f"is {_kind(chunk.get('text'))}", "a string")
    _check_text(chunk["text"], place / "text")


def _check_text(text: Any, place: _Place) -> None:
    if not isinstance(text, str):
        raise place.error(f"is {_kind(text)}", "a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise place.error(f"lone surrogate {lone!r} at character {error.start}", "text that UTF-8 can hold") from error


def _check_weight(weight: Any, place: _Place) -> None:
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise place.error(repr(weight), "0 (rendered, no loss) or 1 (trained on)")


def _check_tool_calls(tool_calls: Any, place: _Place) -> None:
    if not isinstance(tool_calls, Sequence) or isinstance(tool_calls, str):
        raise place.error(f"is {_kind(tool_calls)}", "a list")
    for index, call in enumerate(tool_calls):
        here = place / index
        if not isinstance(call, Mapping):
            raise here.error(f"is {_kind(call)}", 'an object with "id" and "function"')
        _check_known(call, {"id", "type", "function"}, here)
        if call.get("id") is not None:
            _check_text(call["id"], here / "id")
        _check_function(call, here, {"name", "arguments"})
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str):
            _check_text(arguments, here / "function" / "arguments")
        elif not isinstance(arguments, Mapping | None):
            raise (here / "function" / "arguments").error(
                f"is {_kind(arguments)}", "an object, or its JSON as a string"
            )
        else:
            _check_json(arguments, here / "function" / "arguments")


def _check_tools(tools: Any, place: _Place) -> None:
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise place.error(f"is {_kind(tools)}", "a list")
    for index, tool in enumerate(tools):
        here = place / index
        if not isinstance(tool, Mapping):
            raise here.error(f"is {_kind(tool)}", 'an object with "type" and "function"')
        _check_known(tool, {"type", "function"}, here)
        _check_function(tool, here, {"name", "description", "parameters", "strict"})
        parameters = tool["function"].get("parameters")
        if not isinstance(parameters, Mapping):
            raise (here / "function" / "parameters").error(f"is {_kind(parameters)}", "a JSON Schema object")
        _check_json(tool, here)


def _check_function(owner: Mapping[str, Any], place: _Place, known: set[str]) -> None:
    if owner.get("type", "function") != "function":
        raise (place / "type").error(repr(owner["type"]), "'function'")
    function = owner.get("function")
    if not isinstance(function, Mapping):
        raise (place / "function").error(f"is {_kind(function)}", "an object with a name")
    _check_known(function, known, place / "function")
    _check_text(function.get("name"), place / "function" / "name")


def _check_known(data: Mapping[str, Any], known: set[str], place: _Place) -> None:
    for key, value in data.items():
        if key not in known and value is not None:
            raise (place / str(key)).error("unknown field", "one of " + ", ".join(sorted(known)))


def _check_json(value: Any, place: _Place) -> None:
    """Refuse what is inside a JSON value and cannot be written again as UTF-8 JSON."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise place.error(f"cannot be written as JSON: {error}") from error


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), "a list" if isinstance(value, Sequence) else type(value).__name__)
