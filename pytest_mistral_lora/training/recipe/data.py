"""The recipe's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pytest_mistral_lora.training.recipe.fields import Number, Section, from_recipe


class Data(Section):
    """The rows: chat JSONL files, and which of them are held out."""

    train: tuple[Path, ...] = Field(description="Chat JSONL files, in order.", min_length=1)
    eval: tuple[Path, ...] = Field(default=(), description="Chat JSONL files that are never trained on.")
    held_out: Number = Field(
        default=0.0,
        description="Fraction of the training rows to hold out, from 0 to below 1; each row's own hash decides, so a "
        "row never changes sides when others come or go.",
        ge=0,
        lt=1,
    )

    @field_validator("train", "eval")
    @classmethod
    def _beside_recipe(cls, value: tuple[Path, ...], info: ValidationInfo) -> tuple[Path, ...]:
        return tuple(from_recipe(path, info) for path in value)

    @model_validator(mode="after")
    def _one_way_to_hold_out(self) -> Self:
        if self.eval and self.held_out:
            raise ValueError("expected either eval files or a held_out fraction, not both")
        return self
