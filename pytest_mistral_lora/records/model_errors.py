"""Errors of pydantic models, put into the words of a recipe: `expected one of 'linear', 'cosine'`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from pytest_mistral_lora.errors import did_you_mean

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_short": "at least {min_length} characters",
    "path_type": "a path",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "at least {min_length}, found {actual_length}",
    "too_long": "at most {max_length}, found {actual_length}",
}
"""What a value should have been, by pydantic's type of the error; the names in braces are those of its context."""


def error_in_words(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return the fault that one of pydantic's errors names, without the value.

    Args:
        error: An item of `ValidationError.errors()`.
        model: The model, which knows the keys beside a misspelt one.

    Example:
        ``no such key (did you mean 'learning_rate'?)``
    """
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(error["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        *section, key = error["loc"]
        places = _places(model.model_json_schema(), section)
        keys = sorted({name for place in places for name in place.get("properties", {})})
        hint = did_you_mean(str(key), keys)
        return f"no such key{hint}" if hint else f"no such key; expected one of {', '.join(keys)}"
    if kind == "literal_error":
        names = [name.strip("'") for name in str(context["expected"]).replace(" or ", ", ").split(", ")]
        return f"expected {context['expected']}{did_you_mean(str(error['input']), names)}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind].format(**context)}"
    return str(error["msg"]).replace("Input should be", "expected")


def _places(schema: Mapping[str, Any], path: Sequence[str | int]) -> Iterator[Mapping[str, Any]]:
    """Yield the schemas of the value at a path: one for each kind of value that it may be."""
    places = list(_kinds(schema, schema))
    for step in path:
        inner = [
            place.get("items") if isinstance(step, int) else place.get("properties", {}).get(step) for place in places
        ]
        # a step that is no key names the kind of the value, which the schema writes as a branch
        places = [kind for one in inner if one for kind in _kinds(one, schema)] or places
    yield from places


def _kinds(place: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield a schema, or each of the schemas that it refers to or chooses from."""
    if "$ref" in place:
        yield from _kinds(schema["$defs"][place["$ref"].rpartition("/")[2]], schema)
    branches = [*place.get("anyOf", ()), *place.get("oneOf", ()), *place.get("allOf", ())]
    for branch in branches:
        yield from _kinds(branch, schema)
    if "$ref" not in place and not branches:
        yield place
