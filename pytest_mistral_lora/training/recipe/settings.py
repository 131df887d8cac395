"""The sections of a recipe that set how a run trains, and the checks of its generated answers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Discriminator, Field, StrictBool, Tag, field_validator, model_validator

from pytest_mistral_lora.chat.completions import FormatCheck, Kind, schema_violation
from pytest_mistral_lora.chat.encoded import Policy, Truncation, Unsupervised
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.errors import InputError, RecipeError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.training.recipe.data import Entry, objectives_of, opened
from pytest_mistral_lora.training.recipe.declared import EvaluationCommand
from pytest_mistral_lora.training.recipe.sections import (
    NonNegative,
    Number,
    ObjectiveWords,
    Positive,
    RecipePath,
    Section,
    SectionWithObjective,
    Seed,
)

SHORT_RUN = 20
"""The most steps of a run that learns early enough from its own steps that memory is short."""


class MaxTokensCheck(Section):
    """The completion has no more tokens than this, EOS included."""

    max_tokens: Positive = Field(description="Tokens of the longest completion.")


class RegexCheck(Section):
    """The whole text matches this pattern."""

    regex: str = Field(description="Python's `re`; the dot matches line ends too.")

    @field_validator("regex")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return value


class JsonSchemaCheck(Section):
    """The text is JSON that keeps the schema in this file."""

    json_schema: RecipePath = Field(description="JSON Schema file, relative to the recipe.")


def _kind(value: Any) -> str | None:
    # a tag for the union: without one, pydantic reports the faults of all alternatives for one wrong check
    if isinstance(value, str):
        return "plain" if value in ("json", "tool_call", "eos") else None
    keys = list(value) if isinstance(value, Mapping) else list(getattr(type(value), "model_fields", ()))
    return keys[0] if len(keys) == 1 and isinstance(keys[0], str) else None


CompletionCheck = Annotated[
    Annotated[Literal["json", "tool_call", "eos"], Tag("plain")]
    | Annotated[MaxTokensCheck, Tag("max_tokens")]
    | Annotated[RegexCheck, Tag("regex")]
    | Annotated[JsonSchemaCheck, Tag("json_schema")],
    Discriminator(
        _kind,
        custom_error_type="format_check",
        custom_error_message="expected json, tool_call, eos, json_schema: PATH, regex: PATTERN or max_tokens: N",
    ),
]
"""One check of a completion's form, as a recipe writes it."""


_RETENTION = NOWHERE.within("evaluation", "retention", "rows")


class Retention(Section):
    """Rows of other subjects, whose loss the adapter must not raise."""

    rows: tuple[Entry, ...] = Field(
        description="Files that are never trained on, named like `data.eval`.", min_length=1
    )
    max_loss_increase: Number = Field(
        default=0.05, description="Largest increase of their loss against the base, in nats a trained token.", ge=0
    )

    def files(self, objective: Objective) -> list[DataFile]:
        """Return the data files in order; a folder stands for its files.

        Args:
            objective: The objective of entries without one.

        Raises:
            RecipeError: If an entry cannot be opened.
        """
        files = opened(_RETENTION, self.rows, objective, is_held_out=True)
        return [replace(file, is_retention=True) for file in files]

    @property
    def paths(self) -> tuple[Path, ...]:
        """The named paths."""
        return tuple(entry if isinstance(entry, Path) else entry.path for entry in self.rows)

    def objectives(self, objective: Objective) -> Iterator[tuple[Place, Objective]]:
        """Yield the objective of each entry, and the key that declares it.

        Args:
            objective: The objective of entries without one.
        """
        return objectives_of(_RETENTION, self.rows, objective)


class Evaluation(Section):
    """Measurements on a few generated answers, beside the held-out loss; and the gate, which judges the adapter."""

    generations: NonNegative = Field(
        default=0,
        description="Held-out rows (training rows, if you hold out none) whose last turn is generated greedily and "
        "compared.",
    )
    generation_steps: Positive | None = Field(
        default=None, description="Optimizer steps between two rounds of generations; default: only the end."
    )
    max_new_tokens: Positive = Field(default=256, description="Longest generation, in tokens.")
    checks: tuple[CompletionCheck, ...] = Field(
        default=(),
        description="Forms that each answer must have: json, tool_call, eos, json_schema: PATH, regex: PATTERN, "
        "max_tokens: N. The log has the rate of answers that pass as eval_format/NAME.",
    )
    gate: StrictBool = Field(
        default=False,
        description="Whether the run compares base and adapter at its end, and fails if the held-out loss rose, the "
        "rate of a check fell, or `retention` is not kept.",
    )
    retention: Retention | None = Field(
        default=None,
        description="Rows of other subjects for the gate: `{rows: [general.jsonl], max_loss_increase: 0.05}`.",
    )
    commands: tuple[EvaluationCommand, ...] = Field(
        default=(),
        description="Commands of yours that evaluate the adapter, such as a harness or a script: a text, or "
        "{command, files} with the files that it leaves. You run them; the notes list them, with the files' hashes.",
    )

    def format_checks(self) -> tuple[FormatCheck, ...]:
        """Return the checks with the content of their schema files.

        Raises:
            RecipeError: If a file cannot be read or does not hold a JSON Schema, or if two checks have the same name.
        """
        found = tuple(map(_format_check, self.checks))
        names = [check.name for check in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise RecipeError(
                f"two are called {twice}",
                place=NOWHERE.within("evaluation", "checks"),
                expected="files of different names",
            )
        return found

    @model_validator(mode="after")
    def _has_something_to_look_at(self) -> Self:
        given = [name for name in ("generation_steps", "checks") if getattr(self, name)]
        if given and not self.generations:
            raise ValueError(f"{given[0]} without generations; expected generations, the number of rows")
        if len(set(map(repr, self.checks))) < len(self.checks):
            raise ValueError("checks: one of them is given twice")
        if self.retention is not None and not self.gate:
            raise ValueError("retention without gate; expected gate: true, which judges these rows")
        return self


def _of_schema(file: Path) -> Place:
    return Place.of("evaluation.checks") / f"json_schema {file}"


def _format_check(check: Any) -> FormatCheck:
    if isinstance(check, str):
        return FormatCheck(cast(Kind, check))
    if isinstance(check, MaxTokensCheck):
        return FormatCheck("max_tokens", check.max_tokens)
    if isinstance(check, RegexCheck):
        return FormatCheck("regex", check.regex)
    file = check.json_schema
    try:
        schema = read_json(file)
    except InputError as error:
        raise RecipeError(error.found, place=_of_schema(file)) from error
    wrong = schema_violation(schema)
    if wrong:
        raise RecipeError(f"not a JSON Schema: {wrong}", place=_of_schema(file))
    return FormatCheck("json_schema", schema, f"json_schema:{file.name}")


Beta = Annotated[Number, Field(ge=0, lt=1)]


class Training(SectionWithObjective):
    """The optimisation."""

    steps: Positive | None = Field(default=None, description="Optimizer steps; give this or `epochs`.", le=10**9)
    epochs: Number | None = Field(
        default=None, description="Passes over the training rows; give this or `steps`.", gt=0, le=1e6
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        default="adamw", description="AdamW with its two moments in fp32, or in 8 bits by bitsandbytes."
    )
    betas: tuple[Beta, Beta] = Field(
        default=(0.9, 0.999), description="AdamW's decay of the mean gradient and of the mean square, per step."
    )
    epsilon: Number = Field(default=1e-8, description="AdamW's epsilon, added to the denominator.", gt=0)
    learning_rate: Number = Field(default=2e-4, description="Peak learning rate of AdamW.", ge=0)
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="cosine", description="Learning rate after the warm-up."
    )
    min_learning_rate_ratio: Number | None = Field(
        default=None,
        description="Last learning rate of a cosine, as a fraction of `learning_rate`; default: 0.",
        gt=0,
        lt=1,
    )
    warmup_steps: NonNegative = Field(default=0, description="Steps over which the learning rate rises from 0.")
    warmup_ratio: Number | None = Field(
        default=None,
        description="The same as a fraction of all steps, rounded up; give this or `warmup_steps`.",
        gt=0,
        lt=1,
    )
    batch_size: Positive = Field(default=8, description="Rows in an optimizer step, over all devices.")
    micro_batch_tokens: Positive = Field(
        default=4096,
        description="Tokens that one device computes at once; this only splits the step. A longer row is computed "
        "alone.",
    )
    share_prefix: StrictBool = Field(
        default=False,
        description="Whether rows of a micro-batch that begin with the same tokens (a system prompt, tools) share the "
        "passes of their beginning; changes no gradient, and may be slower on a GPU. Needs `lora.dropout: 0`.",
    )
    max_length: Positive = Field(default=4096, description="Longest row in tokens; see `truncation` for longer ones.")
    truncation: Truncation = Field(
        default="error",
        description="A row longer than `max_length`: error stops, drop leaves it out, right cuts its end off, with "
        "the labels.",
    )
    unsupervised: Unsupervised = Field(
        default="error",
        description="A row without a token to train on: error stops, drop leaves it out, warn keeps it and warns you.",
    )
    objective: ObjectiveWords = Field(
        default=ANSWERS,
        description="Tokens that have a loss: `answers`, `last-answer`, `last-round` or `everything`; `no-thinking` "
        "and `no-calls` take some away, as in `last-answer,no-thinking`. An entry of `data` can name another one.",
        json_schema_extra={"default": str(ANSWERS)},
    )
    weight_decay: Number = Field(
        default=0.0, description="AdamW's decoupled weight decay, per step and learning rate.", ge=0
    )
    max_grad_norm: Number = Field(
        default=1.0, description="Gradients are scaled down to this L2 norm; 0 leaves them.", ge=0
    )
    seed: Seed = Field(default=0, description="Seed of the adapter's initial values and of dropout.")
    order_seed: Seed | None = Field(default=None, description="Seed of the order of the rows; default: `seed`.")
    precision: Literal["fp32", "bf16", "fp16", "auto"] = Field(
        default="auto",
        description="dtype of the base model; auto: bf16 if your GPU has it, else fp32. The adapter is fp32. "
        "fp16, for GPUs without bf16, scales the loss and skips the steps that overflow.",
    )
    max_skipped_steps: Positive = Field(
        default=20, description="fp16: the run stops when so many steps one after another overflow.", le=100
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Device of the model; auto: a GPU if you have one."
    )
    dry_run: StrictBool | None = Field(
        default=None,
        description="Whether to try the largest micro-batch before the first step, so that you learn early if memory "
        f"is short; default: in a run of more than {SHORT_RUN} steps.",
    )
    on_oom: Literal["stop", "shrink"] = Field(
        default="stop",
        description="If memory runs out: stop and report the settings that would fit, or shrink: go on with smaller "
        "micro-batches, then activation checkpointing, which change no gradient.",
    )
    activation_checkpointing: StrictBool = Field(
        default=False, description="Compute activations twice to keep fewer of them."
    )
    kernels: Literal["liger"] | None = Field(
        default=None,
        description="liger: its fused norms, rotary embedding and SwiGLU in the layers of this model, of any class, "
        "on a GPU; needs liger-kernel.",
    )
    logging_steps: Positive = Field(
        default=10,
        description="Optimizer steps between two lines of the log; the first and the last step have one, too.",
    )
    eval_steps: Positive | None = Field(
        default=None,
        description="Steps between two held-out losses; default: only before the first step and at the end.",
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
        description="Stop, and name the rows, if the gradients' L2 norm, before it is scaled down, is above this.",
        gt=0,
    )
    report_to: tuple[str, ...] = Field(
        default=(),
        description="Loggers of transformers that get the log, such as tensorboard (files in OUTPUT.logs), wandb or "
        "mlflow; default: none, and nothing is sent anywhere unless you name one.",
    )

    def tries_largest(self, steps: int) -> bool:
        """Return whether a run that is `steps` optimizer steps from its end tries the largest micro-batch first."""
        return steps > SHORT_RUN if self.dry_run is None else self.dry_run

    @property
    def seed_of_order(self) -> int:
        """Seed of the order of the rows."""
        return self.seed if self.order_seed is None else self.order_seed

    @property
    def policy(self) -> Policy:
        """The policy for rows that cannot be trained on unchanged."""
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

    def planned_steps(self, rows: int) -> int:
        """Return the optimizer steps of a run on this many rows; the last step of an epoch may have fewer rows."""
        return self.steps or math.ceil((self.epochs or 1.0) * math.ceil(rows / self.batch_size))

    def warmup(self, steps: int) -> int:
        """Return the warm-up steps of a run of `steps` optimizer steps."""
        # rounded as transformers does it: a manifest records this number
        return self.warmup_steps if self.warmup_ratio is None else math.ceil(steps * self.warmup_ratio)
