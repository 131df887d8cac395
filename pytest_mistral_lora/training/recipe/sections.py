"""The sections of a recipe that name base and adapter, and the types of their values."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    StrictBool,
    StrictInt,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from pytest_mistral_lora.chat.objective import MODIFIERS, TURNS, WORDS, Objective
from pytest_mistral_lora.checkpoint.hub_cache import COMMIT
from pytest_mistral_lora.errors import InputError, TokenizerError
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import NOWHERE
from pytest_mistral_lora.records.base_location import base_weights_command


def _yaml_number(value: Any) -> Any:
    # YAML 1.1, which PyYAML reads, takes `2e-4` for a string, and `yes` for a boolean, which pydantic would make 1.0
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        return float(value)
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


# strict: pydantic would take `true` for 1, and "8" for 8
Number = Annotated[float, BeforeValidator(_yaml_number)]
# within 32 bits: torch, numpy and transformers count in machine integers, and loop over some of them
_MOST = 2**31 - 1
Positive = Annotated[StrictInt, Field(gt=0, le=_MOST)]
NonNegative = Annotated[StrictInt, Field(ge=0, le=_MOST)]
Seed = Annotated[StrictInt, Field(ge=0, lt=2**32)]
"""The seeds that numpy takes."""


class Section(BaseModel):
    """A part of a recipe: frozen, without unknown keys."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_LONGEST_PATH = 3_800
_LONGEST_NAME = 255


def written_path(path: Path) -> str:
    """Return a path as a recipe names it: `./~` is a folder of that name, and `~` alone the home folder."""
    return f"./{path.as_posix()}" if path.as_posix().startswith("~") else path.as_posix()


def _in_home(value: Any) -> Any:
    # the text, not the path: a path drops the `./` that tells a folder named `~` from the home folder
    if not isinstance(value, str) or not value.startswith("~"):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # no such user
        raise ValueError(str(error)) from error


def from_recipe(path: Path, info: ValidationInfo) -> Path:
    """Return a path, relative to the recipe's folder unless it is absolute.

    Raises:
        ValueError: If no file system has such a path.
    """
    folder: Path = (info.context or {}).get("folder", Path())
    try:
        found = folder / path
        encoded = os.fsencode(found)
    except UnicodeError as error:  # half of a surrogate pair
        raise ValueError(str(error)) from error
    if b"\0" in encoded:
        raise ValueError("a path with a null character")
    if len(encoded) > _LONGEST_PATH or any(len(os.fsencode(part)) > _LONGEST_NAME for part in found.parts):
        raise ValueError(f"a path longer than a file system has: {_LONGEST_PATH} bytes, {_LONGEST_NAME} each name")
    return found


RecipePath = Annotated[Path, BeforeValidator(_in_home), AfterValidator(from_recipe)]


def _pin_step(info: ValidationInfo) -> str:
    """Return the step that writes the pin into the recipe."""
    # pydantic takes no message with half a surrogate pair
    name = printable(str((info.context or {}).get("place", "")), lines=False)
    return f"Write it: mistral-lora pin {shlex.quote(name) if name.endswith(('.yaml', '.yml')) else 'recipe.yaml'}"


def _objective(value: Any) -> Objective:
    if isinstance(value, Objective):
        return value
    try:
        return Objective.of(value, NOWHERE)
    except InputError as error:
        raise ValueError(f"{error.found}; expected {error.expected}") from error


_WORD = "|".join(WORDS)
ObjectiveWords = Annotated[
    Objective,
    PlainValidator(_objective),
    PlainSerializer(str, return_type=str),
    WithJsonSchema(
        {
            "type": "string",
            "pattern": rf"^\s*({_WORD})\s*(,\s*({_WORD})\s*)*$",
            # editors complete these
            "examples": [*TURNS, *MODIFIERS, ",".join(("last-answer", *MODIFIERS))],
        }
    ),
]
"""Words for the tokens that have a loss, as a recipe writes them."""


class SectionWithObjective(Section):
    """A section that has a key `objective`."""

    @model_validator(mode="before")
    @classmethod
    def _words_are_one_value(cls, data: Any) -> Any:
        # `{objective: last-answer,no-calls}` is a mapping of two keys in YAML: the comma ends the first value
        split = [word for word in WORDS if isinstance(data, dict) and word in data and data[word] is None]
        if split and "objective" in data:
            words = ",".join((str(data["objective"]), *split))
            raise ValueError(
                f"{split[0]} is a key, since a comma ends a value in braces; expected objective: '{words}'"
            )
        return data


_HEX64 = r"^[0-9a-f]{64}$"


class Base(Section):
    """The base model: a Hub repository at a commit, or a local folder with the hash of its weights."""

    repo: str | None = Field(default=None, description="Hub repository, `owner/name`.", pattern=r"^[^/\s]+/[^/\s]+$")
    revision: str | None = Field(
        default=None, description="Commit of the repository: 40 hex digits, not a branch or tag."
    )
    path: RecipePath | None = Field(default=None, description="Local checkpoint folder, relative to the recipe.")
    weights_sha256: str | None = Field(
        default=None,
        description="SHA-256 of the local weights: of model.safetensors, or of its shards' digests, one a line.",
        pattern=_HEX64,
    )
    name: str | None = Field(
        default=None,
        description="Name of a local base in manifest and adapter; default: its path as you write it here.",
    )
    oracle: str | None = Field(
        default=None,
        description="Mistral tokenizer of a base without tekken.json and tokenizer.model.vN: a name such as spm-v3, a "
        "path, or none; default: recognised by the vocabulary.",
    )
    quantization: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: load the linear layers in 4 bits (QLoRA, double quantisation); needs bitsandbytes.",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_is_the_path_as_written(cls, data: Any) -> Any:
        # before `path` is made absolute: the name is published, and the folders of this machine are not
        if isinstance(data, dict) and data.get("path") and not data.get("name"):
            return {**data, "name": str(data["path"])}
        return data

    @field_validator("revision")
    @classmethod
    def _is_a_commit(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not COMMIT.fullmatch(value):
            kind = "a branch or tag, which can move to other weights"
            if re.fullmatch(r"[0-9a-fA-F]{4,39}", value):
                kind = "a short hash, which can become ambiguous"
            raise ValueError(f"{kind}; expected a commit: 40 lower-case hex digits. {_pin_step(info)}")
        return value

    @field_validator("oracle")
    @classmethod
    def _is_an_oracle(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        # only here: mistral-common takes a second to import
        from pytest_mistral_lora.checkpoint.recognition import known_choice

        try:
            return known_choice(value, from_recipe(Path(), info))
        except TokenizerError as error:
            raise ValueError(f"{error.found}; expected {error.expected}") from error

    @model_validator(mode="after")
    def _is_one_pinned_base(self, info: ValidationInfo) -> Self:
        if (self.repo is None) == (self.path is None):
            raise ValueError("expected either repo and revision, or path and weights_sha256")
        if self.repo is not None and (self.revision is None or self.weights_sha256 or self.name):
            step = f". {_pin_step(info)}" if self.revision is None else ""
            raise ValueError(f"a Hub base needs its revision (a commit: 40 hex digits), and nothing else{step}")
        if self.path is not None and self.revision is not None:
            raise ValueError("a local base has no revision; expected weights_sha256 alone")
        if self.path is not None and self.weights_sha256 is None:
            command = printable(base_weights_command(self.path), lines=False)
            raise ValueError(f"a local base needs weights_sha256. Compute it: {command}")
        return self

    @property
    def label(self) -> str:
        """Name of this base in the manifest and in the adapter's configuration."""
        return str(self.repo or self.name)


def _or_one_name(schema: dict[str, Any]) -> None:
    """Let the schema of a list also take a single name, as the validator does."""
    several = {key: schema.pop(key) for key in ("type", "items", "minItems")}
    schema["anyOf"] = [{"type": "string"}, several]


def _or_one_index(schema: dict[str, Any]) -> None:
    """Let the schema of a list of indices also take a single one, as the validator does."""
    schema["anyOf"] = [{"type": "integer", "minimum": 0}, *schema["anyOf"]]


_NAME = re.compile(r"[A-Za-z0-9_.+-]+")
"""The names of modules, and of groups of them: what has other characters is a regular expression."""

_LARGEST_RANK, _LARGEST_ALPHA, _MOST_PATTERNS = 8192, 1e6, 2_000
_Rank = Annotated[Positive, Field(le=_LARGEST_RANK)]
_Alpha = Annotated[Number, Field(gt=0, le=_LARGEST_ALPHA)]


def _require_pattern(pattern: str) -> None:
    """Refuse a text that is no regular expression.

    Raises:
        ValueError: With the text and the reason.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
    if not pattern:
        raise ValueError("an empty pattern; expected the end of a module's name, such as q_proj")


class Lora(Section):
    """The adapter."""

    r: Positive = Field(default=16, description="Rank of each pair of matrices.", le=_LARGEST_RANK)
    alpha: Number = Field(
        default=32.0,
        description="Scale: the update counts alpha / r, or alpha / sqrt(r) with rslora.",
        gt=0,
        le=_LARGEST_ALPHA,
    )
    rank_pattern: dict[str, _Rank] | None = Field(
        default=None,
        description="Ranks of some layers, by patterns: regular expressions of the end of a layer's name, such as "
        "`{v_proj: 32}`; each other layer has `r`.",
        max_length=_MOST_PATTERNS,
    )
    alpha_pattern: dict[str, _Alpha] | None = Field(
        default=None,
        description="Scales of some layers, by patterns like those of `rank_pattern`; each other layer has `alpha`.",
        max_length=_MOST_PATTERNS,
    )
    dropout: Number = Field(
        default=0.0, description="Probability that an input of an adapter is zeroed in training.", ge=0, lt=1
    )
    target_modules: tuple[str, ...] = Field(
        default=("attention",),
        description="Linear layers of the text model to adapt: attention, attention+mlp or all-linear, or last names; "
        "each must be in every layer. Or one regular expression that full names match, as in PEFT.",
        min_length=1,
        json_schema_extra=_or_one_name,
    )
    layers_to_transform: tuple[NonNegative, ...] | None = Field(
        default=None,
        description="Indices of the decoder layers to adapt, from 0; default: all.",
        min_length=1,
        json_schema_extra=_or_one_index,
    )
    rslora: StrictBool = Field(default=False, description="Whether to scale by 1 / sqrt(r) (rank-stabilised LoRA).")
    dora: StrictBool = Field(
        default=False, description="Whether to train a magnitude for each output of a layer as well (DoRA)."
    )
    modules_to_save: tuple[str, ...] = Field(
        default=(),
        description="Modules to train and save in full, such as lm_head, by last name; a large adapter.",
    )
    start: RecipePath | None = Field(
        default=None,
        description="Folder of an adapter to go on from, relative to the recipe: one of this trainer, or PEFT's files "
        "of another; r, alpha, rslora, dora, the layers, modules_to_save and the base must be those of it.",
    )

    @property
    def target_pattern(self) -> str | None:
        """The regular expression that chooses the layers; None if names do."""
        only = self.target_modules[0]
        return None if _NAME.fullmatch(only) else only

    @field_validator("target_modules", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _one_index(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @field_validator("target_modules", "modules_to_save")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a name appears twice")
        return value

    @field_validator("layers_to_transform")
    @classmethod
    def _each_layer_once(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a layer appears twice")
        return value

    @field_validator("target_modules")
    @classmethod
    def _names_or_one_pattern(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        patterns = [name for name in value if not _NAME.fullmatch(name)]
        if patterns and len(value) > 1:
            raise ValueError(f"{patterns[0]!r} is no name; expected names, or one regular expression alone")
        for pattern in patterns:
            _require_pattern(pattern)
        return value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _are_patterns(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        for pattern in value or {}:
            _require_pattern(pattern)
        return value or None

    @model_validator(mode="after")
    def _layers_chosen_once(self) -> Self:
        if self.layers_to_transform is not None and self.target_pattern is not None:
            raise ValueError(
                f"layers_to_transform {list(self.layers_to_transform)} beside the pattern {self.target_pattern!r} of "
                "target_modules, which chooses the layers; expected one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_train_a_module(self) -> Self:
        both = sorted(set(self.target_modules) & set(self.modules_to_save))
        if both:
            raise ValueError(f"{both[0]} is in target_modules and in modules_to_save; expected one of them")
        return self
