"""The recipe's adapter."""

from __future__ import annotations

from typing import Self

from pydantic import Field, StrictBool, field_validator, model_validator

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
    dora: StrictBool = Field(
        default=False, description="Whether to train a magnitude for each output of a layer as well (DoRA)."
    )
    modules_to_save: tuple[str, ...] = Field(
        default=(),
        description="Modules to train and save in full, such as lm_head, by last name; a large adapter.",
    )

    @field_validator("target_modules", "modules_to_save")
    @classmethod
    def _each_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a name appears twice")
        return value

    @model_validator(mode="after")
    def _one_way_to_train_a_module(self) -> Self:
        both = sorted(set(self.target_modules) & set(self.modules_to_save))
        if both:
            raise ValueError(f"{both[0]} is in target_modules and in modules_to_save; expected one of them")
        return self
