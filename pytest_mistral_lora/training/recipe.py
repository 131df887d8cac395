"""The recipe of a run: what is trained, on what, how. Every value is checked before anything heavy is loaded."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictBool,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from pytest_mistral_lora.errors import RecipeError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEX64 = r"^[0-9a-f]{64}$"


def _yaml_number(value: Any) -> Any:
    """YAML 1.1 reads `2e-4` as a string, and `yes` as a boolean that would count as 1."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value):
        return float(value)
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


_Number = Annotated[float, BeforeValidator(_yaml_number)]
_Positive = Annotated[StrictInt, Field(gt=0)]
_NonNegative = Annotated[StrictInt, Field(ge=0)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _from_recipe(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path())
    return folder / path.expanduser()


class Base(_Section):
    """The base model: a Hub repository at a commit, or a local folder with the hash of its weights."""

    repo: str | None = Field(default=None, description="Hub repository, `owner/name`.", pattern=r"^[^/\s]+/[^/\s]+$")
    revision: str | None = Field(
        default=None, description="Commit of the repository: 40 hex digits; no branch, no tag."
    )
    path: Path | None = Field(default=None, description="Local checkpoint folder, relative to the recipe.")
    weights_sha256: str | None = Field(
        default=None,
        description="SHA-256 of the local weights: of model.safetensors, or of its shards' digests, one a line.",
        pattern=_HEX64,
    )
    name: str | None = Field(
        default=None, description="What manifest and adapter call a local base; default: its path here."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_is_the_path_as_written(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("path") and not data.get("name"):
            return {**data, "name": str(data["path"])}
        return data

    @field_validator("revision")
    @classmethod
    def _is_a_commit(cls, value: str | None) -> str | None:
        if value is not None and not _COMMIT.fullmatch(value):
            raise ValueError(f"{_revision_kind(value)}; expected a commit: 40 lower-case hex digits")
        return value

    @field_validator("path")
    @classmethod
    def _beside_recipe(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return value if value is None else _from_recipe(value, info)

    @model_validator(mode="after")
    def _is_one_pinned_base(self) -> Self:
        if (self.repo is None) == (self.path is None):
            raise ValueError("expected either repo and revision, or path and weights_sha256")
        if self.repo is not None and (self.revision is None or self.weights_sha256 or self.name):
            raise ValueError("a Hub base needs its revision (a commit: 40 hex digits), and nothing else")
        if self.path is not None and self.revision is not None:
            raise ValueError("a local base has no revision; expected weights_sha256 alone")
        if self.path is not None and self.weights_sha256 is None:
            raise ValueError(f"a local base needs weights_sha256. Compute it: {_hash_command(self.path)}")
        return self

    @property
    def label(self) -> str:
        """What the manifest and the adapter's configuration call this base."""
        return str(self.repo or self.name)


def _revision_kind(value: str) -> str:
    if re.fullmatch(r"[0-9a-fA-F]{4,39}", value):
        return "a short hash, which can become ambiguous"
    return "a branch or tag, which can move to other weights"


def _hash_command(path: Path) -> str:
    from pytest_mistral_lora.records.identity import base_weights_command

    return base_weights_command(path)


class Data(_Section):
    """The rows: chat JSONL files, and which of them are held out."""

    train: tuple[Path, ...] = Field(description="Chat JSONL files, in order.", min_length=1)
    eval: tuple[Path, ...] = Field(default=(), description="Chat JSONL files that are never trained on.")
    held_out: _Number = Field(
        default=0.0,
        description="Fraction of the training rows to hold out, from 0 to below 1; each row's own hash decides, so a "
        "row never changes sides when others come or go.",
        ge=0,
        lt=1,
    )

    @field_validator("train", "eval")
    @classmethod
    def _beside_recipe(cls, value: tuple[Path, ...], info: ValidationInfo) -> tuple[Path, ...]:
        return tuple(_from_recipe(path, info) for path in value)

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.eval and self.held_out:
            raise ValueError("expected either eval files or a held_out fraction, not both")
        return self


class Lora(_Section):
    """The adapter."""

    r: _Positive = Field(default=16, description="Rank of each pair of matrices.")
    alpha: _Number = Field(
        default=32.0, description="Scale: the update counts alpha / r, or alpha / sqrt(r) with rslora.", gt=0
    )
    dropout: _Number = Field(
        default=0.0, description="Probability that an input of an adapter is zeroed in training.", ge=0, lt=1
    )
    target_modules: tuple[str, ...] = Field(
        default=PROJECTIONS,
        description="Linear layers to adapt, by last name; each must be in every layer.",
        min_length=1,
    )
    rslora: StrictBool = Field(default=False, description="Whether to scale by 1 / sqrt(r) (rank-stabilised LoRA).")

    @field_validator("target_modules")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a name appears twice")
        return value


class Training(_Section):
    """The optimisation."""

    steps: _Positive | None = Field(default=None, description="Optimizer steps; give this or epochs.")
    epochs: _Number | None = Field(default=None, description="Passes over the training rows; give this or steps.", gt=0)
    learning_rate: _Number = Field(default=2e-4, description="Peak learning rate of AdamW.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate after the warm-up."
    )
    warmup_steps: _NonNegative = Field(default=0, description="Steps over which the learning rate rises from 0.")
    batch_size: _Positive = Field(default=8, description="Rows in an optimizer step, over all devices.")
    micro_batch_size: _Positive = Field(default=1, description="Rows in one forward pass on one device.")
    max_length: _Positive = Field(
        default=4096, description="Tokens in the longest row; a longer one is an error, never cut."
    )
    weight_decay: _Number = Field(
        default=0.0, description="AdamW's decoupled weight decay, per step and learning rate.", ge=0
    )
    max_grad_norm: _Number = Field(
        default=1.0, description="Gradients are scaled down to this L2 norm; 0 leaves them.", ge=0
    )
    seed: _NonNegative = Field(default=0, description="Seed of the adapter's initial values and of dropout.")
    order_seed: _NonNegative | None = Field(default=None, description="Seed of the order of the rows; default: seed.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="auto",
        description="dtype of the base model; auto: bf16 where a GPU has it, else fp32. The adapter is fp32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the model runs.")
    activation_checkpointing: StrictBool = Field(
        default=False, description="Compute activations twice to keep fewer of them."
    )
    logging_steps: _Positive = Field(default=10, description="Optimizer steps between two lines of the log.")
    eval_steps: _Positive | None = Field(
        default=None, description="Steps between two held-out losses; default: only the end."
    )
    checkpoint_steps: _Positive = Field(
        default=100, description="Steps between two checkpoints that a killed run resumes from."
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected either steps or epochs")
        if self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}"
            )
        return self


class Evaluation(_Section):
    """What is measured after training, beside the held-out loss."""

    generations: _NonNegative = Field(
        default=0,
        description="Held-out rows (training rows, if none) whose last turn is generated greedily and compared.",
    )
    max_new_tokens: _Positive = Field(default=256, description="Longest generation, in tokens.")


class Recipe(_Section):
    """One run of the trainer."""

    json_schema: ClassVar[dict[str, Any]]
    """The JSON Schema of a recipe, for editors."""

    _folder: Path = PrivateAttr(default_factory=Path)

    base: Base = Field(description="The base model.")
    backend: Literal["mistral-common", "chat-template"] = Field(
        default="mistral-common", description="How a row becomes ids: Mistral's own tokenization, or the chat template."
    )
    data: Data = Field(description="The rows.")
    lora: Lora = Field(default_factory=Lora, description="The adapter.")
    training: Training = Field(description="The optimisation.")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="What is measured after training.")
    output: Path = Field(description="Folder to make for the adapter, relative to the recipe.")

    @field_validator("output")
    @classmethod
    def _beside_recipe(cls, value: Path, info: ValidationInfo) -> Path:
        return _from_recipe(value, info)

    def path_as_written(self, path: Path) -> str:
        """Return a path of this recipe relative to the recipe's folder, where it is below it."""
        return (path.relative_to(self._folder) if path.is_relative_to(self._folder) else path).as_posix()

    def as_written(self) -> dict[str, Any]:
        """Return the recipe as plain JSON data that makes the same recipe beside the same files."""
        data = self.model_dump(mode="json", exclude_none=True)
        data["output"] = self.path_as_written(self.output)
        for name in ("train", "eval"):
            data["data"][name] = [self.path_as_written(path) for path in getattr(self.data, name)]
        if self.base.path:
            data["base"]["path"] = self.path_as_written(self.base.path)
        return data


Recipe.json_schema = Recipe.model_json_schema()


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file; its relative paths are relative to the file.

    Raises:
        RecipeError: If the file cannot be read, is not YAML, names a key twice, or a value is wrong; all are named.
    """
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", place=str(path)) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid YAML: {error}", place=str(path)) from error
    return parse_recipe(data, folder=path.parent, place=str(path))


def parse_recipe(data: Any, *, folder: Path | None = None, place: str = "recipe") -> Recipe:
    """Check plain data and return it as a recipe.

    Args:
        data: What a YAML file holds.
        folder: What relative paths are relative to; None for the working directory.
        place: Where the data came from, for messages.

    Raises:
        RecipeError: If a value is wrong; all are named.
    """
    if not isinstance(data, dict):
        raise RecipeError(
            f"is a {type(data).__name__}", place=place, expected="a mapping with base, data, training, output"
        )
    try:
        recipe = Recipe.model_validate(data, context={"folder": folder or Path()})
    except ValidationError as error:
        raise _refusal(error, place) from error
    recipe._folder = folder or Path()
    return recipe


def _refusal(error: ValidationError, place: str) -> RecipeError:
    lines = []
    for one in error.errors(include_url=False):
        field = ".".join(str(step) for step in one["loc"])
        message = one["msg"].removeprefix("Value error, ")
        missing = one["type"] in ("missing", "value_error") and isinstance(one["input"], dict)
        lines.append(f"{field}: {message}" if missing else f"{field}: {one['input']!r}: {message}")
    if len(lines) == 1:
        field, _, found = lines[0].partition(": ")
        return RecipeError(found, place=f"{place}, {field}")
    return RecipeError("\n".join([f"{len(lines)} bad values", *(f"  {line}" for line in lines)]), place=place)


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} appears twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)
