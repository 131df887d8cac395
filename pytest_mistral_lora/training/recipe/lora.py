"""The recipe's adapter."""

from __future__ import annotations

from pydantic import Field, StrictBool, field_validator

from pytest_mistral_lora.training.recipe.fields import Number, Positive, Section

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class Lora(Section):
    """The adapter."""

    r: Positive = Field(default=16, description="Rank of each pair of matrices.")
    alpha: Number = Field(
        default=32.0, description="Scale: the update counts alpha / r, or alpha / sqrt(r) with rslora.", gt=0
    )
    dropout: Number = Field(
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
