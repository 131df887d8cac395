"""The arguments of a tool call compared with the schema of its tool: nulls that it does not take, and other faults.

A null at a key that the schema does not name is a fault, although JSON Schema allows any further key: a table of Arrow
gives each call the columns of all the others, and fills them with null. A tool that takes further keys says so
(`additionalProperties`, `patternProperties`), or has no `properties`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.reading import loads_strict


def argument_object(arguments: Any) -> tuple[Mapping[str, Any] | None, str]:
    """Return the object that the arguments of a call are or spell; None and a description of them if they are not one.

    Args:
        arguments: The arguments of a checked call: an object, a text, or null.
    """
    # mistral-common reads missing arguments, or an empty text, as an empty object
    value = arguments or {}
    if isinstance(value, Mapping):
        return value, ""
    try:
        # strictly: mistral-common keeps only the second of two equal keys, and writes NaN
        value = loads_strict(value)
    except ValueError as error:
        return None, f"a text that is not strict JSON: {str(error).removeprefix('not valid JSON: ')}"
    if isinstance(value, Mapping):
        return value, ""
    if not isinstance(value, str):
        return None, "JSON, but not an object"
    # ids have arguments that are no JSON as a JSON string
    inner, words = argument_object(value)
    return None, words if inner is None else "JSON that was encoded twice"


# the rest of a text from where the parser stops, if more text would make JSON of it
_CUT = re.compile(r"(?:-|tr?u?|fa?l?s?|nu?l?|(?<=[0-9])(?:\.|[eE][+-]?)|(?<=\\)u[0-9a-fA-F]{0,4})?\Z")


def is_cut_json(arguments: Any) -> bool:
    """Return whether arguments are a text that more text would make JSON of: the parser ends at its end."""
    if not isinstance(arguments, str):
        return False
    text = arguments.rstrip(" \t\r\n")
    try:
        # ids have such a text as a JSON string
        return is_cut_json(json.loads(text))
    except json.JSONDecodeError as error:
        is_cut = error.msg.startswith("Unterminated string") or _CUT.match(text, error.pos) is not None
        return is_cut and text.lstrip().startswith("{")
    except (ValueError, RecursionError):
        # a number of too many digits
        return False


class ArgumentFaults(NamedTuple):
    """The faults of the arguments of a call.

    Attributes:
        nulls: JSON paths of the nulls that the tool does not take.
        wrong: Their first other fault by the schema, with its JSON path; empty if they have no other.
    """

    nulls: tuple[str, ...] = ()
    wrong: str = ""


def argument_faults(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> ArgumentFaults:
    """Return the faults of arguments by the schema of their tool; no faults if the schema cannot judge them."""
    from referencing.exceptions import Unresolvable

    nulls, wrong = set(), []
    try:
        nulls |= {f"${path}" for path in _unknown_nulls(arguments, [schema], schema)}
        validator = _validator(json.dumps(schema))
        for error in validator.iter_errors(arguments) if validator else ():
            if error.instance is None and isinstance(error.schema, dict) and error.schema.get("nullable") is True:
                continue  # OpenAPI's word for a null that the tool takes
            if error.instance is None:
                nulls.add(error.json_path)
            elif error.validator != "additionalProperties" or not nulls:
                wrong.append(error)
    except (Unresolvable, RecursionError, re.error, ArithmeticError):
        # not judged: the schema is not valid, or refers to another document or endlessly to itself, or a number is too
        # large for a float
        return ArgumentFaults()
    first = min(wrong, key=lambda error: (len(error.absolute_path), error.json_path), default=None)
    return ArgumentFaults(tuple(sorted(nulls)), f"{first.json_path}: {first.message:.300}" if first else "")


def forbidden_values(value: Any, schema: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the JSON path and the value of each part that a schema forbids; nothing if the schema cannot judge it."""
    from referencing.exceptions import Unresolvable

    try:
        validator = _validator(json.dumps(schema))
        for error in validator.iter_errors(value) if validator else ():
            is_taken = isinstance(error.schema, dict) and error.schema.get("nullable") is True
            if error.instance is not None or not is_taken:
                yield error.json_path, error.instance
    except (Unresolvable, RecursionError, re.error, ArithmeticError):
        return  # as for `argument_faults`


def _unknown_nulls(value: Any, schemas: Sequence[Any], root: Any) -> Iterator[str]:
    """Yield the JSON path of each null under a key that no schema of its object names.

    Args:
        value: The arguments, or a part of them.
        schemas: The schemas that may hold for it.
        root: The whole schema, which references point into.
    """
    schemas = _combined(schemas, root)
    if isinstance(value, list):
        parts = [schema.get("items") for schema in schemas]
        for index, item in enumerate(value):
            yield from (f"[{index}]{path}" for path in _unknown_nulls(item, parts, root))
        return
    named = [schema["properties"] for schema in schemas if isinstance(schema.get("properties"), Mapping)]
    if not isinstance(value, Mapping) or not named:
        return
    is_open = any(schema.get("additionalProperties") or schema.get("patternProperties") for schema in schemas)
    is_open |= any(
        schema.keys() <= {"type", "description", "title"} for schema in schemas if schema.get("type") == "object"
    )
    for key, item in value.items():
        parts = [properties[key] for properties in named if key in properties]
        if parts:
            yield from (f".{key}{path}" for path in _unknown_nulls(item, parts, root))
        elif item is None and not is_open:
            yield f".{key}"


def _combined(schemas: Sequence[Any], root: Any) -> list[Mapping[str, Any]]:
    """Return the schemas with all that they refer to, and all alternatives."""
    found: list[Mapping[str, Any]] = []
    rest = [*schemas]
    while rest:
        schema = rest.pop(0)
        if not isinstance(schema, Mapping) or any(schema is other for other in found):
            continue
        found.append(schema)
        combined = [schema.get(key) for key in ("allOf", "anyOf", "oneOf")]
        rest += [part for parts in combined if isinstance(parts, list) for part in parts]
        rest += [schema.get("then"), schema.get("else")]
        if str(schema.get("$ref")).startswith("#/"):
            target = root
            for step in schema["$ref"][2:].split("/"):
                target = target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
            rest.append(target)
    return found


# a repeated group, such as (a+)+, may take longer than the age of the universe
_SLOW = re.compile(r"\)[*+{]")


def _property_patterns(schema: Any) -> Iterator[str]:
    """Yield the patterns by which a schema and its parts name keys."""
    if isinstance(schema, dict):
        named = schema.get("patternProperties")
        yield from named if isinstance(named, dict) else ()
        for value in schema.values():
            yield from _property_patterns(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _property_patterns(item)


@lru_cache(maxsize=1024)  # the rows of a dataset share a few tools
def _validator(schema: str) -> Any:
    """Return a validator of a tool's schema; None if it is not a JSON Schema, or names keys by a slow pattern."""
    from jsonschema import Draft7Validator, validators
    from referencing import Registry

    parsed = json.loads(schema)
    extend: Any = validators.extend  # the stubs leave its arguments open
    named = parsed.get("$schema")
    # mistral-common checks a tool by Draft 7. A schema may name a later draft and still not be valid by it.
    drafts = (validators.validator_for({"$schema": str(named)}, default=Draft7Validator), Draft7Validator)
    chosen = next((draft for draft in drafts if draft(draft.META_SCHEMA).is_valid(parsed)), None)
    if chosen is None or any(map(_SLOW.search, _property_patterns(parsed))):
        return None
    plain = chosen.VALIDATORS["pattern"]

    def pattern(validator: Any, value: str, instance: Any, schema: Any) -> Any:
        return () if _SLOW.search(value) else plain(validator, value, instance, schema) or ()

    # an empty registry: a reference to another document is never fetched
    return extend(chosen, {"pattern": pattern})(parsed, registry=Registry())
