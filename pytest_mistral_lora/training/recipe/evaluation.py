"""What a recipe measures, beside the held-out loss."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from pytest_mistral_lora.chat.format_checks import FormatCheck, Kind, schema_violation
from pytest_mistral_lora.errors import InputError, RecipeError
from pytest_mistral_lora.records.files import read_json
from pytest_mistral_lora.training.recipe.fields import NonNegative, Positive, Section, from_recipe


class MaxTokensCheck(Section):
    """The completion has no more tokens than this, EOS included."""

    max_tokens: Positive = Field(description="Tokens of the longest completion.")


class RegexCheck(Section):
    """The whole text matches this pattern."""

    regex: str = Field(description="Python's `re`; the dot matches line ends too.")

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class JsonSchemaCheck(Section):
    """The text is JSON that keeps the schema in this file."""

    json_schema: Path = Field(description="JSON Schema file, relative to the recipe.")

    @field_validator("json_schema")
    @classmethod
    def _beside_recipe(cls, value: Path, info: ValidationInfo) -> Path:
        return from_recipe(value, info)


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "plain" if value in ("json", "tool_call", "eos") else None
    keys = list(value) if isinstance(value, Mapping) else list(getattr(type(value), "model_fields", ()))
    return keys[0] if len(keys) == 1 and isinstance(keys[0], str) else None


Check = Annotated[
    Annotated[Literal["json", "tool_call", "eos"], Tag("plain")]
    | Annotated[MaxTokensCheck, Tag("max_tokens")]
    | Annotated[RegexCheck, Tag("regex")]
    | Annotated[JsonSchemaCheck, Tag("json_schema")],
    Discriminator(
        _kind,
        custom_error_type="format_check",
        custom_error_message="expected json, tool_call, eos, json_schema: PATH, regex: PATTERN or max_tokens: N",
    ),
]
"""One check of a completion's form, as a recipe writes it."""


class Evaluation(Section):
    """What is measured on a few generations, beside the held-out loss."""

    generations: NonNegative = Field(
        default=0,
        description="Held-out rows (training rows, if none) whose last turn is generated greedily and compared.",
    )
    generation_steps: Positive | None = Field(
        default=None, description="Optimizer steps between two rounds of generations; default: only the end."
    )
    max_new_tokens: Positive = Field(default=256, description="Longest generation, in tokens.")
    checks: tuple[Check, ...] = Field(
        default=(),
        description="Forms that each generation is held to: json, tool_call, eos, json_schema: PATH, regex: PATTERN, "
        "max_tokens: N. The rate that passes is logged as eval_format/NAME.",
    )

    def format_checks(self) -> tuple[FormatCheck, ...]:
        """Return the checks, the files of their schemas read.

        Raises:
            RecipeError: If a file cannot be read, or holds no JSON Schema, or two of one name.
        """
        found = tuple(map(_format_check, self.checks))
        names = [check.name for check in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeError(f"two are called {twice}", place="evaluation.checks", expected="files of different names")
        return found

    @model_validator(mode="after")
    def _has_something_to_look_at(self) -> Self:
        given = [name for name in ("generation_steps", "checks") if getattr(self, name)]
        if given and not self.generations:
            raise ValueError(f"{given[0]} without generations; expected generations, the number of rows")
        if len(set(map(repr, self.checks))) < len(self.checks):
            raise ValueError("checks: one of them is given twice")
        return self


def _format_check(check: Any) -> FormatCheck:
    if isinstance(check, str):
        return FormatCheck(cast(Kind, check))
    if isinstance(check, MaxTokensCheck):
        return FormatCheck("max_tokens", check.max_tokens)
    if isinstance(check, RegexCheck):
        return FormatCheck("regex", check.regex)
    return _schema_check(check.json_schema)


def _schema_check(file: Path) -> FormatCheck:
    try:
        schema = read_json(file)
    except InputError as error:
        raise RecipeError(error.found, place=f"evaluation.checks, json_schema {file}") from error
    wrong = schema_violation(schema)
    if wrong:
        raise RecipeError(f"not a JSON Schema: {wrong}", place=f"evaluation.checks, json_schema {file}")
    return FormatCheck("json_schema", schema, f"json_schema:{file.name}")
