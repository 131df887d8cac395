"""Tool calls and results of a row: held to the tools that the row offers, and to each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from pytest_mistral_lora.chat.rows import Row, weight_of
from pytest_mistral_lora.conformance.finding import Finding


def call_findings(row: Row) -> Iterator[Finding]:
    """Yield calls of unknown tools, arguments that are no object or not the tool's, and results of no call."""
    parameters = {tool["function"]["name"]: tool["function"]["parameters"] for tool in row.tools or ()}
    for index, message in enumerate(row.messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            place = f"{row.place}, messages[{index}].tool_calls[{number}].function"
            name, arguments = call["function"]["name"], call["function"].get("arguments")
            if name not in parameters:
                expected = f"one of {', '.join(sorted(parameters))}" if parameters else "a tool of the row"
                yield Finding("ML618", f"calls {name!r}, which the row does not offer", f"{place}.name", expected)
            # mistral-common takes no arguments, or an empty text, for an empty object
            value, kind = arguments or {}, "JSON, but not an object"
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except (ValueError, RecursionError):
                    value, kind = None, "a text that is not JSON"
                if isinstance(value, str):
                    kind = "JSON that was encoded twice"
            if not isinstance(value, Mapping):
                yield Finding("ML619", f"are {kind}", f"{place}.arguments", "an object, or its JSON as a string")
            elif name in parameters:
                # a call of weight 0 may be wrong on purpose: the model only reads it
                trained = bool(weight_of(message))
                yield from _argument_findings(value, parameters[name], f"{place}.arguments", trained=trained)
    yield from _result_findings(row)


def _argument_findings(
    arguments: Mapping[str, Any], schema: Mapping[str, Any], place: str, *, trained: bool
) -> Iterator[Finding]:
    """Yield nulls that the tool does not know, and the first way in which the rest breaks the tool's schema."""
    from referencing.exceptions import Unresolvable

    nulls = {".".join(("$", *path)) for path in _unknown_nulls(arguments, schema)}
    wrong = []
    try:
        for error in _validator(json.dumps(schema)).iter_errors(arguments):
            if error.instance is None:
                nulls.add(error.json_path)
            elif error.validator != "additionalProperties" or not nulls:
                wrong.append(error)
    except (Unresolvable, RecursionError, re.error):
        return  # a schema that refers to another document, or to itself without end, judges nothing
    if nulls:
        found = f"null at {', '.join(sorted(nulls))}, which the tool does not take"
        yield Finding("ML623", found, place, "no such keys: a table format fills the columns of other rows with null")
    if wrong and trained:
        error = min(wrong, key=lambda one: (len(one.absolute_path), one.json_path))
        yield Finding("ML622", f"{error.json_path}: {error.message:.300}", place, "arguments of the tool's own schema")


def _unknown_nulls(value: Any, schema: Any) -> Iterator[tuple[str, ...]]:
    """Yield the path of each null under a key that the schema of its object does not name."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(value, Mapping) or not isinstance(properties, Mapping):
        return
    for key, item in value.items():
        if key in properties:
            yield from ((key, *path) for path in _unknown_nulls(item, properties[key]))
        elif item is None and not schema.get("additionalProperties") and not schema.get("patternProperties"):
            yield (key,)


@lru_cache(maxsize=1024)  # the rows of a dataset share a few tools
def _validator(schema: str) -> Any:
    from jsonschema import Draft7Validator, validators
    from referencing import Registry

    parsed = json.loads(schema)
    extend: Any = validators.extend  # the stubs leave its arguments open
    # draft 7 is the one by which mistral-common checks a tool
    chosen = validators.validator_for(parsed, default=Draft7Validator)
    plain = chosen.VALIDATORS["pattern"]

    def pattern(validator: Any, value: str, instance: Any, schema: Any) -> Any:
        # a repeated group, such as (a+)+, may take longer than the age of the universe
        return () if re.search(r"\)[*+{]", value) else plain(validator, value, instance, schema) or ()

    # an empty registry: a reference to another document is never fetched
    return extend(chosen, {"pattern": pattern})(parsed, registry=Registry())


def _result_findings(row: Row) -> Iterator[Finding]:
    """Yield results whose id is of no call of the turn before, or was answered already, or that name another tool."""
    open_calls: dict[Any, str] = {}
    for index, message in enumerate(row.messages):
        if message["role"] != "tool":
            calls = message.get("tool_calls") or ()
            # two messages in a row that call tools are one turn
            kept = open_calls if calls and index and row.messages[index - 1].get("tool_calls") else {}
            open_calls = kept | {call.get("id"): call["function"]["name"] for call in calls}
            continue
        # up to v2 a call needs no id
        if (call_id := message.get("tool_call_id")) is None or None in open_calls:
            continue
        place = f"{row.place}, messages[{index}]"
        known = ", ".join(map(repr, open_calls)) or "a call before it"
        called = open_calls.pop(call_id, None)
        if called is None:
            found = f"the id {call_id!r} is of no call of the turn before, or was answered already"
            yield Finding("ML621", found, f"{place}.tool_call_id", known)
        elif message.get("name") not in (None, "", called):
            found = f"the result is of {message['name']!r}, and the call was of {called!r}"
            yield Finding("ML621", found, f"{place}.name", repr(called))
