"""Generate answers to a few rows during a run, apply format checks to them, and log the pass rates."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pytest_mistral_lora.chat.completions import FormatCheck, FormatVerdict, pass_rates, verdicts
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.devices import Precision
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.transcripts import TRANSCRIPTS
from pytest_mistral_lora.training.callbacks import FORMAT
from pytest_mistral_lora.training.generate import Completion, generate
from pytest_mistral_lora.training.generate.record import answer_of, record
from pytest_mistral_lora.training.recipe import Evaluation

GENERATIONS = "generations.jsonl"
"""File of a run with the answers during training: one line per step and row."""


def _is_rate(name: str) -> bool:
    return name.startswith(FORMAT)


def format_checks(evaluation: Evaluation, encoder: Encoder) -> tuple[FormatCheck, ...]:
    """Return the format checks of a recipe.

    Raises:
        RecipeError: If one cannot be made, or the base has no Mistral tokenizer to read tool calls by.
    """
    checks = evaluation.format_checks()
    if any(check.kind == "tool_call" for check in checks) and not encoder.tokenizer.has_oracle:
        raise RecipeError(
            "tool_call, but the base has no Mistral tokenizer, which defines the format of a call",
            place="evaluation.checks",
            expected="a base with tekken.json or tokenizer.model.vN, its name in base.oracle, or other checks",
        )
    return checks


@contextmanager
def preserve_rng_and_modes(model: Any) -> Iterator[None]:
    """Restore each module's training mode and the random generators, so that generation cannot change a run."""
    # each module's own mode: model.train() afterwards would also turn on dropout that a user turned off
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@dataclass(eq=False)
class GenerationCallback(TrainerCallback):  # type: ignore[misc]
    """Answers the same rows every few optimizer steps, and after the last one.

    In a distributed run, every process answers all rows with the unwrapped model, so that none waits for another. The
    answers are the same in each, and the main process writes them.

    Attributes:
        trainer: The trainer; its log gets the pass rates.
        model: The model in training (PEFT).
        encoder: The backend.
        rows: The rows to answer.
        checks: Format checks for each answer.
        max_new_tokens: Longest answer, in tokens.
        every: Optimizer steps between two rounds; None for the last step only.
        file: File that the answers are written to after each round.
    """

    trainer: Any
    model: Any
    encoder: Encoder
    rows: Sequence[Row]
    checks: Sequence[FormatCheck]
    max_new_tokens: int
    every: int | None
    file: Path
    _answers: dict[int, list[Completion]] = field(default_factory=dict)
    _lines: list[dict[str, Any]] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the answers of a killed run up to the step of the checkpoint that the run resumes from."""
        if state.global_step and self.file.is_file():
            lines = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
            self._lines = [line for line in lines if line["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer the rows if a round is due, or the run stops after this step."""
        due = self.every is not None and state.global_step % self.every == 0
        if self.rows and (due or control.should_training_stop):
            due_to_log = control.should_log
            self.answer_rows()
            # Logging the rates resets the flag: without this, the loss of this step would be lost.
            control.should_log = due_to_log

    def answer_rows(self) -> list[Completion]:
        """Return the answers at the trainer's current step; the first call of a step generates, logs and writes."""
        step = self.trainer.state.global_step
        if step in self._answers:
            return self._answers[step]
        with preserve_rng_and_modes(self.model):
            completions = generate(self.model, self.encoder, self.rows, max_new_tokens=self.max_new_tokens)
        self._answers = {step: completions}
        checked = self._checked(completions)
        # a resumed run answers the rows of its first step again: its lines replace those of the killed run
        self._lines = [line for line in self._lines if line["step"] != step]
        for completion, found in zip(completions, checked, strict=True):
            checks = {verdict.name: verdict.reason or "passed" for verdict in found}
            answer = {"text": completion.text, "stop": completion.stop, "equal": completion.equal}
            self._lines.append({"step": step, "row": completion.row, **answer, "checks": checks})
        # a run that resumes from the checkpoint of this step has its rates in the log already
        logged = any(line["step"] == step and any(map(_is_rate, line)) for line in self.trainer.state.log_history)
        if self.checks and completions and not logged:
            self.trainer.log({f"{FORMAT}{name}": rate for name, rate in pass_rates(checked).items()})
        if self.trainer.accelerator.is_main_process and completions:
            write_text(self.file, self.history)
        return completions

    def answers_of(self, step: int) -> list[dict[str, Any]]:
        """Return the lines of `history` of a step."""
        return [line for line in self._lines if line["step"] == step]

    @property
    def history(self) -> str:
        """All answers so far as JSON lines: step, row, text, stop, equality with the row, result of each check."""
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)

    def files(self, identity: Mapping[str, Any], precision: Precision) -> dict[str, str]:
        """Return the content of the files with answers, by name; none if there are no rows. All processes must call it.

        Args:
            identity: The `model` of each transcript.
            precision: dtype of the base's weights.
        """
        transcripts = record(
            self.model,
            self.encoder,
            self.rows,
            self.answer_rows(),
            identity=identity,
            precision=precision,
            max_new_tokens=self.max_new_tokens,
            checks=self.checks,
        )
        texts = {f"{TRANSCRIPTS}/{transcript.case}.json": transcript.to_text() for transcript in transcripts}
        return texts | ({GENERATIONS: self.history} if transcripts else {})

    def latest_rates(self) -> dict[str, float]:
        """Return the share of the answers at the current step that pass each check, from 0 to 1."""
        return pass_rates(self._checked(self.answer_rows()))

    def _checked(self, completions: Sequence[Completion]) -> list[tuple[FormatVerdict, ...]]:
        pairs = zip(completions, self.rows, strict=True)
        return [verdicts(answer_of(one, row, self.encoder), self.checks) for one, row in pairs]
