"""A recipe as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from pytest_mistral_lora.training.recipe.base import Base
from pytest_mistral_lora.training.recipe.data import Data
from pytest_mistral_lora.training.recipe.evaluation import Evaluation, JsonSchemaCheck
from pytest_mistral_lora.training.recipe.fields import Section, from_recipe
from pytest_mistral_lora.training.recipe.lora import Lora
from pytest_mistral_lora.training.recipe.training import Training


class Recipe(Section):
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
    card: dict[str, Any] = Field(
        default_factory=dict,
        description="Metadata for the Hub in the model card `README.md`, such as license, language and datasets.",
    )
    output: Path = Field(description="Folder to make for the adapter, relative to the recipe.")

    @model_validator(mode="after")
    def _no_shared_dropout(self) -> Self:
        if self.training.share_prefix and self.lora.dropout:
            raise ValueError(
                f"training.share_prefix with lora.dropout {self.lora.dropout}: rows would share its mask; "
                "expected lora.dropout 0"
            )
        return self

    @field_validator("output")
    @classmethod
    def _beside_recipe(cls, value: Path, info: ValidationInfo) -> Path:
        return from_recipe(value, info)

    @property
    def folder(self) -> Path:
        """The folder that its relative paths are relative to."""
        return self._folder

    def name_of(self, path: Path) -> str:
        """Return what a manifest calls a file: its path below the recipe's folder, or else its name alone."""
        below = path.is_relative_to(self._folder) and ".." not in path.relative_to(self._folder).parts
        return (path.relative_to(self._folder) if below else Path(path.name)).as_posix()

    def path_as_written(self, path: Path) -> str:
        """Return a path of this recipe relative to the recipe's folder, where it is below it."""
        return (path.relative_to(self._folder) if path.is_relative_to(self._folder) else path).as_posix()

    def as_written(self) -> dict[str, Any]:
        """Return the recipe as plain JSON data that makes the same recipe beside the same files."""
        data = self.model_dump(mode="json", exclude_none=True)
        data["output"] = self.path_as_written(self.output)
        for name in ("train", "eval"):
            data["data"][name] = [self.path_as_written(path) for path in getattr(self.data, name)]
        for written, check in zip(data["evaluation"]["checks"], self.evaluation.checks, strict=True):
            if isinstance(check, JsonSchemaCheck):
                written["json_schema"] = self.path_as_written(check.json_schema)
        if self.base.path:
            data["base"]["path"] = self.path_as_written(self.base.path)
        return data


Recipe.json_schema = Recipe.model_json_schema()
