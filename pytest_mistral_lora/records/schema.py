"""JSON Schemas of records, their violations in words, and the errors of pydantic models in the same words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import getitem
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError, did_you_mean, short_json
from pytest_mistral_lora.places import NOWHERE, Place

if TYPE_CHECKING:
    from pydantic import BaseModel


RECORD = NOWHERE / "$"
"""The place of a whole record, as JSON paths name it."""


@dataclass(frozen=True)
class Violation:
    """A value, or a missing key, that breaks the rules of a record.

    Attributes:
        place: The place of the value within the record: `$.training.schedule.name`.
        found: The value, shortened; empty for a missing key.
        expected: The rule; empty if `found` names it.
    """

    place: Place
    found: str
    expected: str = ""

    def __str__(self) -> str:
        """Return the violation as one line."""
        expected = f"; expected {self.expected}" if self.expected else ""
        return f"{self.place}: {self.found or 'is missing'}{expected}"


def require_valid(found: Sequence[Violation], name: str, place: Path | Place) -> None:
    """Refuse data that has violations.

    Args:
        found: The violations.
        name: The kind of record, for the error: `golden transcript`.
        place: The file.

    Raises:
        InputError: If it has any; all are listed.
    """
    if len(found) == 1:
        raise InputError(f"not a {name}: {found[0]}", place=Place.of(place))
    if found:
        raise InputError(
            "\n".join([f"not a {name}: {len(found)} violations", *(f"  {violation}" for violation in found)]),
            place=Place.of(place),
        )


class RecordSchema:
    """A JSON Schema (2020-12) of a record.

    Attributes:
        file: The file of the schema.
    """

    def __init__(self, file: Path, *, body: Sequence[str] = (), definition: str = "") -> None:
        """Name a schema; it is read at the first use.

        Args:
            file: The file of the schema.
            body: Keys that lead to the subschema with the properties; empty if the schema itself has them.
            definition: The name of the record under `$defs`, if the file has the schemas of several kinds of records.
        """
        self.file: Path = file
        self._definition = definition
        self._body = ("$defs", definition) if definition else tuple(body)

    @cached_property
    def data(self) -> Mapping[str, Any]:
        """The schema as JSON data."""
        data: Mapping[str, Any] = read_json(self.file)
        return data

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator, validators  # only here: most commands read no record

        each, extend = Draft202012Validator.VALIDATORS["items"], cast(Any, validators.extend)

        def judge_items(validator: Any, items: Any, instance: Any, schema: Any) -> Iterator[Any]:
            # a golden holds hundreds of ids and labels, and jsonschema takes most of its time to visit each
            if not _are_integers(items, instance):
                yield from each(validator, items, instance, schema) or ()

        schema = {**self.data, "$ref": f"#/$defs/{self._definition}"} if self._definition else self.data
        return extend(Draft202012Validator, {"items": judge_items})(schema)

    def violations(self, data: Any) -> list[Violation]:
        """Return the violations of the schema, in path order; empty for valid data."""
        # a set: two branches of a schema report the same value twice
        found = {violation for error in self._validator.iter_errors(data) for violation in self._in_words(error)}
        return sorted(found, key=lambda violation: (violation.place.order, violation.expected))

    def _in_words(self, error: Any) -> Iterator[Violation]:
        """Put one `jsonschema.ValidationError` into words; a missing or surplus key is named in the path."""
        rule, schema = error.validator_value, error.schema
        place = RECORD.within(*error.absolute_path)
        # jsonschema reports a missing key at the object that lacks it; the path of the key is easier to find
        if error.validator == "required":
            for name in rule:
                if name not in error.instance:
                    yield Violation(place / name, "", self._description([*error.absolute_path, name]))
        elif error.validator == "additionalProperties" and isinstance(error.instance, dict):
            patterns = schema.get("patternProperties", {})
            known, hint = schema.get("properties", {}), " (your own begin with x-)" if "^x-" in patterns else ""
            for name, value in error.instance.items():
                if name not in known and not any(re.search(pattern, name) for pattern in patterns):
                    yield Violation(place / name, short_json(value), f"no such key{hint}")
        else:
            words = {
                "const": f"{rule!r}",
                "enum": f"one of {rule}",
                "pattern": str(schema.get("description", f"text that matches {rule}")),
                "not": str(schema.get("description", f"not {rule}")),
                "type": " or ".join([rule] if isinstance(rule, str) else map(str, rule))
                if error.validator == "type"
                else "",
                "minimum": f"at least {rule}",
                "maximum": f"at most {rule}",
                "exclusiveMinimum": f"above {rule}",
                "exclusiveMaximum": f"below {rule}",
            }
            expected = words.get(error.validator, f"{error.validator} {rule}")
            yield Violation(place, short_json(error.instance), expected)

    def _description(self, path: Sequence[str | int]) -> str:
        """Return the description of the value at a path."""
        whole: Any = self.data
        place: Mapping[str, Any] = reduce(getitem, self._body, whole)
        for step in path:
            inner = place.get("items") if isinstance(step, int) else place.get("properties", {}).get(step)
            place = inner or {}
            if "$ref" in place:
                # keys beside a reference count, too: a description beside it is about this use
                place = {**reduce(getitem, place["$ref"].removeprefix("#/").split("/"), whole), **place}
        return str(place.get("description", "a value"))


def _are_integers(items: Any, instance: Any) -> bool:
    """Return whether a schema of items asks for integers within bounds and nothing else, and all items are such."""
    if not isinstance(items, dict) or items.get("type") != "integer" or items.keys() - {"type", "minimum", "maximum"}:
        return False
    if not isinstance(instance, list) or {*map(type, instance)} != {int}:
        return False
    least, most = min(instance), max(instance)
    return bool(items.get("minimum", least) <= least and most <= items.get("maximum", most))


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
"""The expected value by pydantic's type of error; names in braces come from the error's context."""


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
        # a step that is not a key names the kind of the value, which the schema writes as a branch
        places = [kind for branch in inner if branch for kind in _kinds(branch, schema)] or places
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
