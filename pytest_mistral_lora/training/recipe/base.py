"""The recipe's base model, pinned."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pytest_mistral_lora.training.recipe.fields import Section, from_recipe

_COMMIT = re.compile(r"[0-9a-f]{40}")
_HEX64 = r"^[0-9a-f]{64}$"


class Base(Section):
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
    quantization: Literal["nf4"] | None = Field(
        default=None,
        description="nf4: the linear layers are loaded in 4 bits (QLoRA, double quantisation); needs bitsandbytes.",
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
        return value if value is None else from_recipe(value, info)

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
