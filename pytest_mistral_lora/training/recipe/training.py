"""The recipe's optimisation: how long, how fast, in which precision, on which device."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, model_validator

from pytest_mistral_lora.chat.policy import Policy, Truncation, Unsupervised
from pytest_mistral_lora.training.recipe.fields import NonNegative, Number, Positive, Section

Beta = Annotated[Number, Field(ge=0, lt=1)]


class Training(Section):
    """The optimisation."""

    steps: Positive | None = Field(default=None, description="Optimizer steps; give this or epochs.")
    epochs: Number | None = Field(default=None, description="Passes over the training rows; give this or steps.", gt=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="AdamW with its two moments in fp32, or in 8 bits by bitsandbytes; paged: they may leave the GPU.",
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="AdamW's decay of the mean gradient and of the mean square, per step."
    )
    epsilon: Number = Field(default=1e-8, description="AdamW's term that keeps a quotient finite.", gt=0)
    learning_rate: Number = Field(default=2e-4, description="Peak learning rate of AdamW.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate after the warm-up."
    )
    min_learning_rate_ratio: Number | None = Field(
        default=None, description="Where a cosine ends, as a fraction of learning_rate; default: at 0.", gt=0, lt=1
    )
    warmup_steps: NonNegative = Field(default=0, description="Steps over which the learning rate rises from 0.")
    warmup_ratio: Number | None = Field(
        default=None,
        description="The same as a fraction of all steps, rounded up; give this or warmup_steps.",
        gt=0,
        lt=1,
    )
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
    max_length: Positive = Field(default=4096, description="Tokens in the longest row that is trained on whole.")
    truncation: Truncation = Field(
        default="error",
        description="What is done with a longer row: error; drop it; right: cut its end off, with the labels there.",
    )
    unsupervised: Unsupervised = Field(
        default="error",
        description="What is done with a row in which no token is trained on: error; drop it; warn, and keep it.",
    )
    weight_decay: Number = Field(
        default=0.0, description="AdamW's decoupled weight decay, per step and learning rate.", ge=0
    )
    max_grad_norm: Number = Field(
        default=1.0, description="Gradients are scaled down to this L2 norm; 0 leaves them.", ge=0
    )
    seed: NonNegative = Field(default=0, description="Seed of the adapter's initial values and of dropout.")
    order_seed: NonNegative | None = Field(default=None, description="Seed of the order of the rows; default: seed.")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        default="auto",
        description="dtype of the base model; auto: bf16 where a GPU has it, else fp32. The adapter is fp32. "
        "fp16, for GPUs without bf16, scales the loss and skips the steps that overflow.",
    )
    max_skipped_steps: Positive = Field(
        default=20, description="fp16: the run stops when so many steps one after another overflow.", le=100
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
    kernels: Literal["liger"] | None = Field(
        default=None, description="liger: its fused norms, rotary embedding and SwiGLU, on a GPU; needs liger-kernel."
    )
    logging_steps: Positive = Field(default=10, description="Optimizer steps between two lines of the log.")
    eval_steps: Positive | None = Field(
        default=None, description="Steps between two held-out losses; default: only the end."
    )
    checkpoint_steps: Positive | None = Field(
        default=100, description="Steps between two checkpoints that a killed run resumes from; null: minutes alone."
    )
    checkpoint_minutes: Number | None = Field(
        default=None,
        description="Minutes from one checkpoint to the next; default: steps alone.",
        gt=0,
    )
    stop_at_grad_norm: Number | None = Field(
        default=None,
        description="Stop, with the rows named, where the gradients' L2 norm, before it is scaled down, is above this.",
        gt=0,
    )
    report_to: tuple[str, ...] = Field(
        default=(),
        description="Loggers of transformers that get the log, such as tensorboard (files in OUTPUT.logs), wandb or "
        "mlflow; default: none, and nothing is sent anywhere.",
    )

    @property
    def seed_of_order(self) -> int:
        """Seed of the order of the rows."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def policy(self) -> Policy:
        """What is done with a row that cannot be trained on as it is."""
        return Policy(self.max_length, self.truncation, self.unsupervised)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected either steps or epochs")
        if self.warmup_steps and self.warmup_ratio is not None:
            raise ValueError("expected either warmup_steps or warmup_ratio")
        if self.min_learning_rate_ratio is not None and self.schedule != "cosine":
            raise ValueError(f"min_learning_rate_ratio is of a cosine, and schedule is {self.schedule}")
        if self.checkpoint_steps is None and self.checkpoint_minutes is None:
            raise ValueError("expected checkpoint_steps or checkpoint_minutes, or both")
        return self

    def warmup(self, steps: int) -> int:
        """Return the warm-up steps of a run of `steps` optimizer steps."""
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(steps * self.warmup_ratio)
