"""Watch a run by what it says: a few rows are answered now and then, and the answers held to their format."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pytest_mistral_lora.chat.completions import FormatCheck, FormatVerdict, pass_rates, verdicts
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.checkpoint.tokenizers import oracle_file
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.callbacks import FORMAT
from pytest_mistral_lora.training.generate.generate import Completion, generate
from pytest_mistral_lora.training.generate.record import answer_of
from pytest_mistral_lora.training.recipe import Evaluation

GENERATIONS = "generations.jsonl"
"""File of a run that holds every watched answer: a line for each step and row."""


def format_checks(evaluation: Evaluation, encoder: Encoder) -> tuple[FormatCheck, ...]:
    """Return the format checks of a recipe.

    Raises:
        RecipeError: If one cannot be made, or the backend has nothing to read tool calls with.
    """
    checks = evaluation.format_checks()
    if any(check.kind == "tool_call" for check in checks) and oracle_file(encoder.tokenizer.path) is None:
        raise RecipeError(
            "tool_call, but the base has no Mistral tokenizer that says how a call is written",
            place="evaluation.checks",
            expected="a base with tekken.json or tokenizer.model.vN, or other checks",
        )
    return checks


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Put modes of modules and random generators back as they were: looking at a run must not change it."""
    modes = {module: module.training for module in model.modules()}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@dataclass(eq=False)
class Watching(TrainerCallback):  # type: ignore[misc]
    """Answers the same rows every so many optimizer steps, and after the last one.

    Every process of a distributed run answers all rows, with the model itself and not its distributed wrapper, so none
    waits for another; they come to the same answers, and the main process writes.

    Attributes:
        trainer: The trainer, whose log gets the rates.
        model: The model in training (PEFT).
        encoder: The backend.
        rows: The rows to answer.
        checks: Format checks that each answer is held to.
        max_new_tokens: Longest answer, in tokens.
        every: Optimizer steps between two rounds; None for the last step only.
        file: Where the answers are written as they come.
    """

    trainer: Any
    model: Any
    encoder: Encoder
    rows: Sequence[Row]
    checks: Sequence[FormatCheck]
    max_new_tokens: int
    every: int | None
    file: Path
    _said: dict[int, list[Completion]] = field(default_factory=dict)
    _lines: list[dict[str, Any]] = field(default_factory=list)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up what a killed run had been answered by the step that it goes on from."""
        if state.global_step and self.file.is_file():
            lines = map(json.loads, self.file.read_text(encoding="utf-8").splitlines())
            self._lines = [line for line in lines if line["step"] <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Answer the rows if it is time."""
        due = self.every is not None and state.global_step % self.every == 0
        if self.rows and (due or control.should_training_stop):
            due_to_log = control.should_log
            self.completions()
            # Logging the rates resets the flag: without this, the loss of this step would be lost.
            control.should_log = due_to_log

    def completions(self) -> list[Completion]:
        """Return the answers at the step where the trainer is; asked for once, they are kept."""
        step = self.trainer.state.global_step
        if step not in self._said:
            with undisturbed(self.model):
                self._said = {step: generate(self.model, self.encoder, self.rows, max_new_tokens=self.max_new_tokens)}
            self._note(step)
        return self._said[step]

    @property
    def history(self) -> str:
        """Every answer so far as JSON lines: step, row, text, what stopped it, verdict of each check."""
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self._lines)

    @property
    def rates(self) -> dict[str, float]:
        """Share of the latest answers that pass each check, from 0 to 1."""
        return pass_rates(self._judged(self.completions()))

    def _judged(self, completions: Sequence[Completion]) -> list[tuple[FormatVerdict, ...]]:
        pairs = zip(completions, self.rows, strict=True)
        return [verdicts(answer_of(one, row, self.encoder), self.checks) for one, row in pairs]

    def _note(self, step: int) -> None:
        completions = self._said[step]
        judged = self._judged(completions)
        known = [line for line in self._lines if line["step"] != step]
        new = [_line(step, one, found) for one, found in zip(completions, judged, strict=True)]
        self._lines = [*known, *new]
        if self.checks and completions:
            self.trainer.log({f"{FORMAT}{name}": rate for name, rate in pass_rates(judged).items()})
        if self.trainer.accelerator.is_main_process and completions:
            write_text(self.file, self.history)


def _line(step: int, completion: Completion, judged: Sequence[FormatVerdict]) -> dict[str, Any]:
    checks = {verdict.name: verdict.reason or "passed" for verdict in judged}
    said = {"text": completion.text, "stop": completion.stop, "equal": completion.equal}
    return {"step": step, "row": completion.row, **said, "checks": checks}
