"""The parts of a recipe that no training step needs: what production serves, and the user's own evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pytest_mistral_lora.errors import InputError, did_you_mean
from pytest_mistral_lora.programs.registry import SERVERS_GROUP, names_in
from pytest_mistral_lora.records.addresses import require_url
from pytest_mistral_lora.records.judgement import TOLERANCES
from pytest_mistral_lora.records.secrets import SERVER_KEY
from pytest_mistral_lora.training.recipe.sections import Section

_LONGEST_NAME = 200
_LONGEST_COMMAND = 4_000
_GENERAL_KINDS = ("auto", "openai")
"""Kinds of servers that are no program: the one that is recognised, and any with OpenAI's API."""


class DeploymentServer(Section):
    """The server that production runs."""

    kind: str = Field(
        default="auto",
        description="Kind of server, as `serve-check` names it; `auto` recognises it. `@11549` behind a kind is the "
        "version, for a server that reports none, and `:bf16` the precision of the served weights: "
        "`KIND@11549:bf16`.",
        # as the schema of the manifest has it: a run must not end in a record that is not valid
        pattern=r"^[A-Za-z0-9_-]+(@[A-Za-z0-9.+_-]+)?(:[a-z0-9_]+)?$",
    )
    url: str = Field(description="Address of the server, without credentials.")
    key_env: str | None = Field(
        default=None,
        description=f"Environment variable with the key of the server: {SERVER_KEY}, or a name that begins with it.",
        pattern=rf"^{SERVER_KEY}(_[A-Z0-9_]+)?$",
    )

    @field_validator("kind")
    @classmethod
    def _is_known(cls, value: str) -> str:
        name, _, precision = value.partition(":")
        kinds = (*_GENERAL_KINDS, *names_in(SERVERS_GROUP))
        if name.partition("@")[0] not in kinds:
            raise ValueError(f"unknown kind of server{did_you_mean(name, kinds)}; expected one of {', '.join(kinds)}")
        if precision and precision not in TOLERANCES:
            raise ValueError(f"unknown precision; expected one of {', '.join(TOLERANCES)}")
        return value

    @model_validator(mode="after")
    def _has_an_address_without_secrets(self) -> Self:
        # a fault of the section, whose value is not shown: an address with a password must not reach a log
        try:
            require_url(self.url)
        except InputError as error:
            raise ValueError(f"url: {error.found}; expected {error.expected}") from error
        if "@" in self.url or re.search(r"[?#]", self.url):
            raise ValueError(f"url: has more than an address; expected no query, and the key in {SERVER_KEY}")
        return self


class Deployment(Section):
    """The deployment: production serves this adapter, or a merged model of it."""

    # `as` is a word of Python
    served_as: Literal["adapter", "merged"] = Field(
        alias="as", description="The served artifact: `adapter`, or a `merged` model of it."
    )
    name: str = Field(description="Name under which production serves it, as clients write it.", min_length=1)
    server: DeploymentServer | None = Field(
        default=None, description="The server that production runs: `serve-check FOLDER` asks it."
    )

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if len(value) > _LONGEST_NAME or not value.isprintable() or re.search(r"^-|[\s`]", value):
            raise ValueError(
                f"expected a name of at most {_LONGEST_NAME} printable characters, without white space and backticks"
            )
        return value

    def to_json(self) -> dict[str, Any]:
        """Return it as the manifest records it."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class UserCommand(Section):
    """A command of yours that evaluates the adapter; you run it."""

    command: str = Field(description="The command, on one line.", min_length=1, max_length=_LONGEST_COMMAND)
    files: tuple[str, ...] = Field(default=(), description="Files that it leaves, below the recipe's folder.")

    @field_validator("command")
    @classmethod
    def _is_one_line(cls, value: str) -> str:
        if not value.isprintable() or not value.strip():
            raise ValueError("expected one line of printable text; several commands are several entries, or a script")
        return value

    @field_validator("files")
    @classmethod
    def _are_below_the_recipe(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            parts = PurePosixPath(name).parts
            if not parts or ".." in parts or PureWindowsPath(name).anchor or "\\" in name or not name.isprintable():
                raise ValueError(f"{name!r} is no path of a file below the recipe's folder, with / between its parts")
        if len({*map(PurePosixPath, value)}) < len(value):
            raise ValueError("a file appears twice")
        return tuple(PurePosixPath(name).as_posix() for name in value)


def _as_mapping(value: Any) -> Any:
    return {"command": value} if isinstance(value, str) else value


EvaluationCommand = Annotated[UserCommand, BeforeValidator(_as_mapping, json_schema_input_type=str | UserCommand)]
"""A command as a recipe writes it: a text, or a mapping with the files that it leaves."""


def command_entries(commands: Sequence[UserCommand]) -> list[dict[str, Any]]:
    """Return commands as entries of the manifest's `evaluation`; none of their files has been read."""
    return [{"command": command.command, "results": {}, "files": dict.fromkeys(command.files)} for command in commands]
