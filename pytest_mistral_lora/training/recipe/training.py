"""The recipe's optimisation: how long, how fast, in which precision, on which device."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, StrictBool, model_validator

from pytest_mistral_lora.training.recipe.fields import NonNegative, Number, Positive, Section


class Training(Section):
    """The optimisation."""

    steps: Positive | None = Field(default=None, description="Optimizer steps; give this or epochs.")
    epochs: Number | None = Field(default=None, description="Passes over the training rows; give this or steps.", gt=0)
    learning_rate: Number = Field(default=2e-4, description="Peak learning rate of AdamW.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate after the warm-up."
    )
    warmup_steps: NonNegative = Field(default=0, description="Steps over which the learning rate rises from 0.")
    batch_size: Positive = Field(default=8, description="Rows in an optimizer step, over all devices.")
    micro_batch_tokens: Positive = Field(
        default=4096,
        description="Tokens that are fed at once on one device; it only splits the step. A longer row is fed alone.",
    )
    share_prefix: StrictBool = Field(
        default=False,
        description="Whether rows of a micro-batch that begin with the same tokens (a system prompt, tools) share the "
        "passes of their beginning; changes no gradient. Needs lora.dropout 0.",
    )
    max_length: Positive = Field(
        default=4096, description="Tokens in the longest row; a longer one is an error, never cut."
    )
    weight_decay: Number = Field(
        default=0.0, description="AdamW's decoupled weight decay, per step and learning rate.", ge=0
    )
    max_grad_norm: Number = Field(
        default=1.0, description="Gradients are scaled down to this L2 norm; 0 leaves them.", ge=0
    )
    seed: NonNegative = Field(default=0, description="Seed of the adapter's initial values and of dropout.")
    order_seed: NonNegative | None = Field(default=None, description="Seed of the order of the rows; default: seed.")
    precision: Literal["fp32", "bf16", "auto"] = Field(
        default="auto",
        description="dtype of the base model; auto: bf16 where a GPU has it, else fp32. The adapter is fp32.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where the model runs.")
    dry_run: StrictBool = Field(
        default=True, description="Whether to try the largest micro-batch before the first step, for its memory."
    )
    on_oom: Literal["stop", "shrink"] = Field(
        default="stop",
        description="Where memory runs out: stop and say what would fit, or go on with smaller micro-batches, then "
        "activation checkpointing, which change no gradient.",
    )
    activation_checkpointing: StrictBool = Field(
        default=False, description="Compute activations twice to keep fewer of them."
    )
    logging_steps: Positive = Field(default=10, description="Optimizer steps between two lines of the log.")
    eval_steps: Positive | None = Field(
        default=None, description="Steps between two held-out losses; default: only the end."
    )
    checkpoint_steps: Positive = Field(
        default=100, description="Steps between two checkpoints that a killed run resumes from."
    )

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected either steps or epochs")
        return self
