"""Check the fields of a chat row: each error names the field and the value."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.chunks.registry import chunk_types
from pytest_mistral_lora.chat.foreign_fields import MEDIA, MEDIA_PARTS, PICTURES
from pytest_mistral_lora.chat.remedies import field_step, import_command, import_step, media_step, role_step
from pytest_mistral_lora.errors import RowError, UncheckedRowError
from pytest_mistral_lora.places import Place, file_of

ROLES = ("system", "user", "assistant", "tool")
_MESSAGE_KEYS = {
    "system": {"role", "content"},
    "user": {"role", "content"},
    "assistant": {"role", "content", "tool_calls", "weight"},
    "tool": {"role", "content", "tool_call_id", "name"},
}
ROW_KEYS = ("messages", "tools", "reasoning_effort", "response_format")
"""The keys of a row that decide its ids."""

REFUSED_KEYS = {
    "continue_final_message": "leaves out the EOS of the last answer",
    "truncate_for_context_length": "leaves out the oldest turns of a long row",
}
"""Fields of mistral-common's request that make it encode only a part of the row, with their effect."""

IN_ORDER = frozenset({"parameters", "arguments", "schema"})
"""Fields whose JSON is encoded with its keys in the order given; everywhere else the order changes no id."""


def error_at(place: Place, found: str, expected: str = "", next_step: str = "") -> RowError:
    """Return the error of a field of a row."""
    return RowError(found, place=place, expected=expected, next_step=next_step)


def unchecked_medium(name: str, found: str, place: Place) -> UncheckedRowError:
    """Return the error of a row with a medium whose tokens are not known.

    Args:
        name: The key or the type of the medium.
        found: What has it.
        place: The place of the medium.
    """
    return UncheckedRowError(
        found, reason=_medium_of(name), place=place, expected="text and images", next_step=media_step(place)
    )


def _medium_of(name: str) -> str:
    return next((medium for medium in ("image", "audio", "video") if medium in name), name)


def refuse_near_misses(data: Mapping[str, Any], place: Place) -> None:
    """Refuse a key of a row that looks like a misspelt one of ours.

    Raises:
        RowError: If the row has such a key.
    """
    for key in data:
        if key in ROW_KEYS:
            continue
        if not isinstance(key, str):
            raise RowError(f"the key {key!r} is not a string", place=place)
        near = difflib.get_close_matches(key.lower(), ROW_KEYS, n=1, cutoff=0.8)
        if near:
            raise RowError(f"unknown key {key!r}", place=place, expected=f"{near[0]!r}, or a name unlike it")


def refuse_keys(data: Mapping[str, Any], place: Place) -> None:
    """Refuse media beside the messages, and settings that make mistral-common leave out a part of the row.

    Raises:
        UncheckedRowError: If the row has media.
        RowError: If it has such a setting.
    """
    for key, effect in REFUSED_KEYS.items():
        if data.get(key):
            raise error_at(place / key, f"{data[key]!r}, which {effect}", "false, or no such key")
    for key in MEDIA:
        if data.get(key):
            found = f"a row with {key}: {data[key]!r}"[:200]
            if key in PICTURES:
                raise error_at(place / key, found, "pictures as chunks of the messages", import_step(file_of(place)))
            raise unchecked_medium(key, found, place / key)


def is_plain(message: Any) -> bool:
    """Return whether a message is a role and a text, in which nothing is left to be checked."""
    return (
        type(message) is dict
        and len(message) == 2
        and message.get("role") in ROLES
        and type(message.get("content")) is str
        and is_utf8(message["content"])
    )


def is_utf8(text: str) -> bool:
    """Return whether UTF-8 can hold a text, or the name of a file: Python has half a surrogate pair for other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_message(message: Any, place: Place) -> None:
    """Check one message of a row.

    Raises:
        RowError: At its first field that cannot be used.
    """
    if not isinstance(message, Mapping):
        raise error_at(place, f"is {kind_of(message)}", 'an object with "role" and "content"')
    role = message.get("role")
    if role not in ROLES:
        found = "is missing" if "role" not in message else repr(role)
        raise error_at(place / "role", found, "one of " + ", ".join(ROLES), role_step(role, place, ROLES))
    for key, value in message.items():
        if _is_unknown(key, value, _MESSAGE_KEYS[role]):
            if key in MEDIA_PARTS:
                raise unchecked_medium(key, f"a message with {key}", place / key)
            known = ", ".join(sorted(_MESSAGE_KEYS[role]))
            step = field_step(key, place, _MESSAGE_KEYS[role])
            raise error_at(place / str(key), f"unknown field of a message with role {role!r}", f"one of {known}", step)
    tool_calls = message.get("tool_calls")
    content = message.get("content")
    # An ASCII string needs no further check. Most contents are one, and a dataset has millions.
    if not (isinstance(content, str) and content.isascii()):
        _check_content(message, place / "content", optional=bool(tool_calls))
    if tool_calls is not None:
        _check_tool_calls(tool_calls, place / "tool_calls")
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise error_at(place / "weight", repr(weight), "0 (rendered, no loss) or 1 (trained on)")
    for key in ("tool_call_id", "name"):
        if message.get(key) is not None:
            check_text(message[key], place / key)


def _check_content(message: Mapping[str, Any], place: Place, *, optional: bool) -> None:
    content, role = message.get("content"), message["role"]
    if content is None:
        if not optional:
            raise error_at(
                place, "is null" if "content" in message else "is missing", "a string or a list of text chunks"
            )
    elif isinstance(content, str):
        check_text(content, place)
    elif not isinstance(content, Sequence):
        raise error_at(place, f"is {kind_of(content)}", "a string or a list of text chunks")
    for index, chunk in enumerate(content if isinstance(content, Sequence) and not isinstance(content, str) else ()):
        here = place / index
        if not isinstance(chunk, Mapping):
            raise error_at(here, f"is {kind_of(chunk)}", 'a chunk: {"type": "text", "text": …}')
        kind, types = chunk.get("type"), chunk_types()
        names = (name for ours in types.values() for name in (ours.name, *ours.foreign_names))
        if isinstance(kind, str) and kind in MEDIA_PARTS and kind not in names:
            raise unchecked_medium(kind, f"{_medium_of(kind)} chunk (type {kind!r})", here)
        if not isinstance(kind, str) or kind not in types:
            expected = " or ".join(repr(name) for name, chunk_type in types.items() if role in chunk_type.roles)
            raise error_at(here / "type", "is missing" if "type" not in chunk else repr(kind), expected)
        if role not in types[kind].roles:
            found = f"{kind} chunk of a message with role {role!r}"
            raise error_at(here, found, f"{kind} of {types[kind].whose}")
        for key, value in chunk.items():
            known = " and ".join(types[kind].keys)
            if key not in types[kind].keys:
                # a table gives every chunk the fields of all chunks
                step = f"To leave out fields of null: {import_command(place)}" if value is None else ""
                raise error_at(here / str(key), f"unknown field of a {kind} chunk", known, step)
        types[kind].check(chunk, here)


def check_text(text: Any, place: Place) -> None:
    """Check a text.

    Raises:
        RowError: If it is not a string, or UTF-8 cannot hold it.
    """
    if not isinstance(text, str):
        raise error_at(place, f"is {kind_of(text)}", "a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        raise error_at(
            place, f"lone surrogate {lone!r} at character {error.start}", "text that UTF-8 can hold"
        ) from error


def _check_tool_calls(tool_calls: Any, place: Place) -> None:
    if not isinstance(tool_calls, Sequence) or isinstance(tool_calls, str):
        raise error_at(place, f"is {kind_of(tool_calls)}", "a list")
    for index, call in enumerate(tool_calls):
        here = place / index
        if not isinstance(call, Mapping):
            raise error_at(here, f"is {kind_of(call)}", 'an object with "id" and "function"')
        _check_known(call, {"id", "type", "function"}, here)
        if call.get("id") is not None:
            check_text(call["id"], here / "id")
        _check_function(call, here, {"name", "arguments"})
        function, here = call["function"], here / "function" / "arguments"
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            check_text(arguments, here)
        elif isinstance(arguments, Mapping | None) and "arguments" in function:
            _check_json(arguments, here)
        else:
            found = f"is {kind_of(arguments)}" if "arguments" in function else "is missing"
            raise error_at(here, found, "an object, or its JSON as a string")


def check_tools(tools: Any, place: Place) -> None:
    """Check the tools of a row.

    Raises:
        RowError: At their first field that cannot be used.
    """
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        step = f"To read its JSON: {import_command(place)}" if isinstance(tools, str) else ""
        raise error_at(place, f"is {kind_of(tools)}", "a list", step)
    for index, tool in enumerate(tools):
        here = place / index
        if not isinstance(tool, Mapping):
            raise error_at(here, f"is {kind_of(tool)}", 'an object with "type" and "function"')
        _check_known(tool, {"type", "function"}, here)
        _check_function(tool, here, {"name", "description", "parameters", "strict"})
        function, inner = tool["function"], here / "function"
        if not isinstance(function.get("parameters"), Mapping):
            found = f"is {kind_of(function.get('parameters'))}"
            raise error_at(inner / "parameters", found, "a JSON Schema object")
        if not isinstance(function.get("description"), str | None):
            raise error_at(inner / "description", f"is {kind_of(function['description'])}", "a string")
        if not isinstance(function.get("strict"), bool | None):
            raise error_at(inner / "strict", f"is {kind_of(function['strict'])}", "true or false")
        _check_json(tool, here)


def check_response_format(data: Any, place: Place) -> None:
    """Check the response format of a row.

    Raises:
        RowError: At its first field that cannot be used.
    """
    if not isinstance(data, Mapping):
        raise error_at(place, f"is {kind_of(data)}", 'an object with "type"')
    _check_known(data, {"type", "json_schema"}, place)
    kind, named = data.get("type", "text"), data.get("json_schema")
    if kind not in ("text", "json_object", "json_schema"):
        raise error_at(place / "type", repr(kind), "one of text, json_object, json_schema")
    here = place / "json_schema"
    if kind != "json_schema":
        if named is not None:
            raise error_at(here, f"is given, and the type is {kind!r}", "the type 'json_schema', or no json_schema")
        return
    if not isinstance(named, Mapping):
        raise error_at(here, f"is {kind_of(named)}", 'an object with "name" and "schema"')
    _check_known(named, {"name", "description", "schema", "strict"}, here)
    check_text(named.get("name"), here / "name")
    if named.get("description") is not None:
        check_text(named["description"], here / "description")
    if not isinstance(named.get("strict"), bool | None):
        raise error_at(here / "strict", f"is {kind_of(named['strict'])}", "true or false")
    if not isinstance(named.get("schema"), Mapping):
        raise error_at(here / "schema", f"is {kind_of(named.get('schema'))}", "a JSON Schema object")
    _check_json(named["schema"], here / "schema")


def _check_function(owner: Mapping[str, Any], place: Place, known: set[str]) -> None:
    if owner.get("type", "function") != "function":
        raise error_at(place / "type", repr(owner["type"]), "'function'")
    function = owner.get("function")
    if not isinstance(function, Mapping):
        raise error_at(place / "function", f"is {kind_of(function)}", "an object with a name")
    _check_known(function, known, place / "function")
    check_text(function.get("name"), place / "function" / "name")


def _check_known(data: Mapping[str, Any], known: set[str], place: Place) -> None:
    for key, value in data.items():
        if _is_unknown(key, value, known):
            raise error_at(place / str(key), "unknown field", "one of " + ", ".join(sorted(known)))


def _is_unknown(key: Any, value: Any, known: set[str]) -> bool:
    # tables pad rows with null under the names of other rows: harmless, unless no file can hold the name
    return key not in known and (value is not None or re.search("[\ud800-\udfff]", str(key)) is not None)


def _check_json(value: Any, place: Place) -> None:
    """Refuse a value that cannot be written as UTF-8 JSON: NaN, a lone surrogate, an object of another type."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise error_at(place, f"cannot be written as JSON: {error}") from error


def without_nulls(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an object that are not null: mistral-common refuses some nulls, and has its own defaults."""
    return {key: value for key, value in data.items() if value is not None}


def kind_of(value: Any) -> str:
    """Return the JSON name of a value's type, with its article, for an error."""
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    if isinstance(value, Mapping):
        return "an object"
    return names.get(type(value), "a list" if isinstance(value, Sequence) else type(value).__name__)
