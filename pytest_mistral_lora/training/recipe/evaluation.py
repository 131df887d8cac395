"""What a recipe measures, beside the held-out loss."""

from __future__ import annotations

from pydantic import Field

from pytest_mistral_lora.training.recipe.fields import NonNegative, Positive, Section


class Evaluation(Section):
    """What is measured after training, beside the held-out loss."""

    generations: NonNegative = Field(
        default=0,
        description="Held-out rows (training rows, if none) whose last turn is generated greedily and compared.",
    )
    max_new_tokens: Positive = Field(default=256, description="Longest generation, in tokens.")
