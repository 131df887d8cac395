"""What stands in tool calls: names, ids, JSON of all kinds, and the tools themselves."""

from __future__ import annotations

import json
import string
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pytest_mistral_lora.strategies.texts import TextStrategy

_WORDS = string.ascii_letters + string.digits + "_-"
_STRANGE_JSON = (
    '{"a": 1, "a": 2}',
    '{"a": {"b": 1, "b": [2]}, "a": {"b": 3}}',
    '{"a": 1.0, "b": 2.50, "c": 1e5, "d": -0.0, "e": 1E-7}',
    '{"a": 123456789012345678901234567890, "b": 0.1000000000000000055511151231257827}',
    '{ "a" :\t[ 1 ,\n2 ] }',
    '{"a": "\\u00e9\\/\\ud83d\\ude00"}',
    "[]",
    "null",
    "",
)
_SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)


def any_id() -> TextStrategy:
    """Generate ids of tool calls."""
    return st.text("0123456789" + string.ascii_letters, min_size=9, max_size=9)


def any_name() -> TextStrategy:
    """Generate names of tools and of their parameters."""
    return st.text(_WORDS, min_size=1, max_size=12)


def _objects(text: TextStrategy) -> SearchStrategy[dict[str, Any]]:
    leaves = text | _SCALARS
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | _dicts(inner), max_leaves=4)
    return _dicts(values)


def _dicts(values: SearchStrategy[Any]) -> SearchStrategy[dict[str, Any]]:
    return st.dictionaries(any_name(), values, max_size=3)


def any_arguments(text: TextStrategy) -> SearchStrategy[Any]:
    """Generate arguments: an object, or a text that is its JSON, JSON within JSON, strange, or no JSON."""
    as_json = st.builds(json.dumps, _objects(text), ensure_ascii=st.booleans())
    return st.one_of(_objects(text), as_json, as_json.map(json.dumps), st.sampled_from(_STRANGE_JSON), _not_json())


def any_result(text: TextStrategy) -> TextStrategy:
    """Generate what a tool gives back: a text, a number, or JSON, encoded once or twice."""
    numbers = st.integers(-(10**6), 10**6).map(str) | st.sampled_from(("0.50", "1e3", "-0", "1E400", "1_0", " 7"))
    as_json = st.builds(json.dumps, _objects(text), ensure_ascii=st.booleans())
    return st.one_of(text, numbers, as_json, as_json.map(json.dumps), st.sampled_from(_STRANGE_JSON))


def _not_json() -> TextStrategy:
    return st.sampled_from(('{"a": ', "{'a': 1}", "a=1", "{} {}"))


def any_tool(text: TextStrategy) -> SearchStrategy[dict[str, Any]]:
    """Generate tools, with and without a description and `strict`."""
    extras: SearchStrategy[dict[str, Any]] = st.fixed_dictionaries({}, optional={"strict": st.booleans()})
    described: SearchStrategy[dict[str, str]] = st.builds(dict, description=text) | st.just({})
    kinds = st.sampled_from(("string", "integer", "number", "boolean"))
    properties = st.dictionaries(any_name(), st.fixed_dictionaries({"type": kinds, "description": text}), max_size=2)
    return st.builds(_tool, any_name(), described, properties, extras)


def _tool(name: str, *parts: dict[str, Any]) -> dict[str, Any]:
    described, properties, extras = parts
    function = {"name": name, **described, "parameters": {"type": "object", "properties": properties}, **extras}
    return {"type": "function", "function": function}


def name_of(tool: dict[str, Any]) -> str:
    """Return the name of a tool."""
    return str(tool["function"]["name"])
