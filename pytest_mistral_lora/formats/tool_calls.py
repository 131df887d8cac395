"""Convert tools and tool calls: their form, their ids, and the call that each result answers."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.fields import error_at, kind_of
from pytest_mistral_lora.chat.reading import loads_strict
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.report import Change, changed, lost
from pytest_mistral_lora.places import Place

# for these keys of a JSON Schema, null is a value
_NULL_VALUES = ("default", "const")
_CALL_ID = re.compile(r"[A-Za-z0-9]{9}")
_FUNCTION_KEYS = {"name", "description", "parameters", "strict"}


def from_json(value: Any, changes: list[Change], place: Place) -> Any:
    """Return the value of a field that may hold JSON as text, as columns of CSV and Parquet do.

    Args:
        value: The value.
        changes: The changes of the row; this one is added.
        place: The place of the field.

    Raises:
        RowError: If the value is a text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        parsed = loads_strict(value)
    except ValueError as error:
        raise error_at(place, f"a text that is {error}") from error
    changes.append(changed("json-text"))
    return parsed


def without_nulls(value: Any, changes: list[Change], *, keep: Sequence[str] = ()) -> Any:
    """Return a value without null keys, at any depth.

    Args:
        value: The value.
        changes: The changes of the row; this one is added.
        keep: Keys that may be null.
    """
    if isinstance(value, Mapping):
        present = {key: item for key, item in value.items() if item is not None or key in keep}
        if len(present) < len(value):
            changes.append(changed("null-keys"))
        return {key: without_nulls(item, changes, keep=keep) for key, item in present.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [without_nulls(item, changes, keep=keep) for item in value]
    return value


def has_padding(items: Any) -> bool:
    """Return whether a list of objects has null keys other than `content`, like an export of a table."""
    return isinstance(items, Sequence) and any(
        value is None and key != "content" for item in items if isinstance(item, Mapping) for key, value in item.items()
    )


def has_foreign_ids(messages: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether a tool call of checked messages has no id, or an id that an import replaces, such as `call_…`."""
    given = [call.get("id") for message in messages for call in message.get("tool_calls") or ()]
    return not all(isinstance(call_id, str) and _CALL_ID.fullmatch(call_id) for call_id in given)


class ResultIdError(RowError):
    """A result of a tool whose id is of no call that waits for one."""


class ToolCalls:
    """The tool calls of one row: a short id for each, and the calls that wait for a result.

    Attributes:
        open: Id and name of each call of the last message without a result yet.
        as_given: Whether the row is judged as it is given: ids, which are in its tokens, stay as they are.
    """

    def __init__(self, *, padded: bool, as_given: bool = False) -> None:
        self.open: list[tuple[str, str]] = []
        self.as_given: bool = as_given
        self._padded = padded
        self._ids: dict[str, str] = {}
        self._taken: set[str] = set()
        self._answered: set[str] = set()

    def reserve_ids(self, items: Sequence[Any]) -> None:
        """Reserve the ids that stay unchanged, so that no other id is converted to one of them."""
        for item in items:
            calls = item.get("tool_calls") if isinstance(item, Mapping) else None
            for call in calls if isinstance(calls, Sequence) else ():
                given = call.get("id") if isinstance(call, Mapping) else None
                if isinstance(given, str) and _CALL_ID.fullmatch(given):
                    self._taken.add(given)

    def read(self, calls: Any, changes: list[Change], place: Place) -> list[dict[str, Any]]:
        """Return the calls of one message in our form; they then wait for results.

        Raises:
            RowError: If a call is not an object.
        """
        made = []
        if not isinstance(calls, Mapping | list | tuple):
            raise error_at(place, f"is {kind_of(calls)}", 'tool calls: [{"name": …, "arguments": …}]')
        for index, given in enumerate([calls] if isinstance(calls, Mapping) else calls):
            here = place / index
            given = from_json(given, changes, here)
            if not isinstance(given, Mapping):
                raise error_at(here, f"is {kind_of(given)}", 'a tool call: {"name": …, "arguments": …}')
            # streamed calls have an index
            call = {key: value for key, value in given.items() if value is not None and key != "index"}
            if len(call) < len(given):
                changes.append(changed("null-keys"))
            if "function" not in call and "name" in call:
                outer = {key: call.pop(key) for key in ("id", "type") if key in call}
                call = {**outer, "type": "function", "function": call}
                changes.append(changed("call-form"))
            for key in [key for key in call if key not in ("id", "type", "function")]:
                changes.append(lost("tool-keys", key, here / key))
                del call[key]
            if isinstance(call.get("function"), Mapping):
                call["function"] = self._function(call["function"], changes, here / "function")
            if not self.as_given:
                # a generated id looks like Mistral's, and is the same for each import of the row
                seed = json.dumps([len(self._taken), call.get("function")], sort_keys=True, default=str)
                call = {"id": self._short_id(call.pop("id", None), changes, seed=seed), **call}
            name = call["function"].get("name") if isinstance(call.get("function"), Mapping) else ""
            self.open.append((str(call.get("id")), str(name)))
            made.append(call)
        return made

    def _function(self, given: Mapping[str, Any], changes: list[Change], place: Place) -> dict[str, Any]:
        function = {key: value for key, value in given.items() if key in ("name", "arguments")}
        if self._padded and isinstance(function.get("arguments"), Mapping):
            function["arguments"] = without_nulls(function["arguments"], changes)
        for key, value in given.items():
            if key not in function and value is not None:
                changes.append(lost("tool-keys", key, place / key))
        return function

    def _short_id(self, given: Any, changes: list[Change], *, seed: str = "") -> str:
        """Return the 9 letters and digits for an id: always the same for one id, and unique in the row.

        Args:
            given: The id in the source; None or empty if the call has none.
            changes: The changes of the row; this one is added.
            seed: The call: the source of a generated id if `given` is missing.
        """
        known = given is not None and given != ""
        text = str(given) if known else seed
        if known and text in self._ids:
            return self._ids[text]
        new = text
        if not known or not _CALL_ID.fullmatch(text):
            changes.append(changed("call-ids" if known else "made-ids"))
            tries = (f"{text}#{number}" if number else text for number in itertools.count())
            # 9 letters and digits of a hash in base 32: 45 bits
            hashes = (hashlib.sha256(attempt.encode(errors="replace")).digest() for attempt in tries)
            shorts = (base64.b32encode(digest)[:9].decode().lower() for digest in hashes)
            new = next(short for short in shorts if short not in self._taken)
        if known:
            self._ids[text] = new
        self._taken.add(new)
        return new

    def answered(self, given: Any, name: Any, changes: list[Change], place: Place) -> str:
        """Return the id of the call that a result answers: by its own id, by the function's name, or the next.

        Raises:
            RowError: If a result without an id finds no waiting call.
            ResultIdError: If its id is of no call, or of one that is answered, and the record's ids are replaced: a
                later check would name ids that the file does not have.
        """
        if given is not None and given != "":
            asked = {name for name in self._ids if self._ids[name] not in self._answered}
            call_id = self._short_id(given, changes)
            if str(given) not in asked and any(name != short for name, short in self._ids.items()):
                found = f"the id {str(given)!r} is of no call of the turn before, or was answered already"
                raise ResultIdError(found, place=place / "tool_call_id", expected=", ".join(map(repr, sorted(asked))))
        elif not self.open:
            raise error_at(place, "a result of a tool that no call asked for", "a tool call before it")
        else:
            call_id = next((call for call, called in self.open if called == name), self.open[0][0])
        self.open = [call for call in self.open if call[0] != call_id]
        self._answered.add(call_id)
        return call_id


def convert_tools(tools: Any, place: Place, *, padded: bool) -> tuple[list[Any] | None, list[Change]]:
    """Return tools as `{type, function}`, or None for a record without tools, and the changes.

    Args:
        tools: The tools of a record.
        place: The place of the tools.
        padded: Whether absent keys are null.

    Raises:
        RowError: If the tools are not a list of objects.
    """
    changes: list[Change] = []
    padded = padded and not isinstance(tools, str)
    tools = from_json(tools, changes, place)
    if not tools:
        return None, changes
    tools = [tools] if isinstance(tools, Mapping) else tools
    if not isinstance(tools, Sequence) or isinstance(tools, str):
        raise error_at(place, f"is {kind_of(tools)}", "a list of tools")
    converted = [
        _tool(from_json(tool, changes, place / index), changes, place / index, padded)
        for index, tool in enumerate(tools)
    ]
    return converted, changes


def _tool(tool: Any, changes: list[Change], place: Place, padded: bool) -> dict[str, Any]:
    if not isinstance(tool, Mapping):
        raise error_at(place, f"is {kind_of(tool)}", "a tool: {name, description, parameters}")
    if padded:
        tool = without_nulls(tool, changes)
    elif has_padding([tool, tool.get("function")]):
        tool = without_nulls(tool, changes, keep=_NULL_VALUES)
    if "function" not in tool and "name" in tool:
        tool = {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        changes.append(changed("tool-form"))
    if not isinstance(tool.get("function"), Mapping):
        return dict(tool)
    given = dict(tool["function"])
    if "input_schema" in given and "parameters" not in given:
        # Anthropic's name for the same schema
        given["parameters"] = given.pop("input_schema")
        changes.append(changed("tool-form"))
    function = {key: value for key, value in given.items() if key in _FUNCTION_KEYS}
    parameters = from_json(function.get("parameters"), changes, place / "function" / "parameters")
    others = [key for key in given if key not in _FUNCTION_KEYS]
    required = given.get("required")
    if isinstance(parameters, Mapping) and isinstance(required, list) and "required" not in parameters:
        # beside the schema, it has no effect: https://json-schema.org/understanding-json-schema/reference/object
        parameters = {**parameters, "required": required}
        others.remove("required")
        changes.append(changed("tool-form"))
    for key in others:
        changes.append(lost("tool-keys", key, place / "function" / key))
    if parameters is None:
        # OpenAI: a function without parameters has an empty list
        parameters = {"type": "object", "properties": {}}
        changes.append(changed("tool-form"))
    return {**tool, "type": tool.get("type") or "function", "function": {**function, "parameters": parameters}}
