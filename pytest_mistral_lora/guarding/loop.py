"""`guard.watch(model)`: the steps of a training loop of your own, judged before the optimizer moves a weight."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.errors import InputError, one_line
from pytest_mistral_lora.guarding.batches import ModelBatch, rows_of, undisturbed
from pytest_mistral_lora.guarding.epoch import EpochRows
from pytest_mistral_lora.guarding.first_batch import shown_tokens
from pytest_mistral_lora.guarding.loss import LossSettings
from pytest_mistral_lora.guarding.pace import Pace
from pytest_mistral_lora.guarding.packing import arguments_of
from pytest_mistral_lora.guarding.processes import failures_of_each, is_first_process, log_crash, raise_together, say
from pytest_mistral_lora.guarding.rows import FirstRows
from pytest_mistral_lora.guarding.settings import GuardSettings
from pytest_mistral_lora.guarding.steps import LOSS, StepWatch
from pytest_mistral_lora.guarding.verdict import (
    GuardedRun,
    green_line,
    judge_run,
    judged_rows,
    note_lines,
    with_later_step,
    with_tokens,
)
from pytest_mistral_lora.judging import Verdict

_LOG = logging.getLogger(__name__)


class LoopWatch:
    """A context manager around a step of a training loop: `guard.watch` makes it.

    The first step is judged, and later ones as `every` says: the rows of the first batch that the model gets in it, and
    its gradient, when the optimizer is about to step or, if it does not, when the block ends. With the first one, the
    model and the tokenizer are judged.

    Attributes:
        verdict: The verdict so far; None before the first step.
    """

    def __init__(self, model: Any, settings: GuardSettings, processing_class: Any = None) -> None:
        """Prepare to watch.

        Args:
            model: The model, perhaps in the wrapper of a library.
            settings: What the guard was told; it judges one batch of a step.
            processing_class: The tokenizer or processor of transformers; None if there is none.
        """
        self.verdict: Verdict | None = None
        self._settings, self._tokenizer = settings, processing_class
        self._model, self._is_compiled = _without_wrappers(model)
        self._run = GuardedRun(SimpleNamespace(), self._model, processing_class, settings.tokenizer)
        self._pace = Pace(settings.every, 0)
        self._step, self._seconds = -1, 0.0
        self._own_batch: Mapping[str, Any] = {}
        self._batch: Mapping[str, Any] | None = None
        self._watch: StepWatch | None = None
        self._hooks = ExitStack()

    def use_batch(self, batch: Mapping[str, Any]) -> None:
        """Take the labels of a batch, if your loop does not give them to the model: call it within the block.

        Args:
            batch: `input_ids` and `labels`, `(batch, length)` int64: one label for each id, not shifted; -100 where it
                has none.
        """
        self._own_batch = batch

    def __enter__(self) -> Self:
        """Begin a step."""
        self._step += 1
        self._pace.begin_step(self._step, self._seconds)
        self._own_batch, self._batch = {}, None
        if self._step == 0 or self._pace.is_judged(self._step):
            self._watch = StepWatch(self._model, self._loss_settings, is_compiled=self._is_compiled)
            self._watch.begin_step(is_judged=True, name="the first step" if self._step == 0 else self._name)
            self._hooks.callback(self._watch.leave)
            for hook in (
                self._model.register_forward_pre_hook(self._take, with_kwargs=True),
                self._model.register_forward_hook(self._taken),
                register_optimizer_step_pre_hook(self._before_step),
            ):
                self._hooks.callback(hook.remove)
        return self

    def __exit__(self, kind: type[BaseException] | None, *given: object) -> None:
        """Judge the step, if the optimizer has not stepped in the block.

        Raises:
            GuardError: If a finding is an error, in any process, and the guard is to stop the run.
        """
        with self._hooks.pop_all():
            if kind is None:
                self._judge()
            self._watch = None

    @property
    def _name(self) -> str:
        return f"step {self._step + 1}"

    def _loss_settings(self, name: str) -> LossSettings:
        return LossSettings.of_model(self._model, self._tokenizer, name)

    def _take(self, model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self._batch is None and model.training and self._watch is not None:
            self._batch = {**arguments_of(model, given, named), **self._own_batch}
            self._watch.begin_batch(self._batch)

    def _taken(self, *given: Any) -> None:
        if self._watch is not None:
            self._watch.end_batch()

    def _before_step(self, *given: Any) -> None:
        self._judge()

    def _judge(self) -> None:
        """Judge the step, once, exchange the outcome with other processes, stop or warn.

        Raises:
            GuardError: As for `__exit__`.
        """
        watch, self._watch = self._watch, None
        if watch is None:
            return
        started = time.perf_counter()
        rows, failure = FirstRows([], 0), ""
        try:
            with undisturbed(None):
                batch = [] if self._batch is None else rows_of(ModelBatch(self._batch), self._step)
                rows = judged_rows(self._run, FirstRows(batch, 1))
                failure = self._failure(rows, watch.results(), started)
                if self._step == 0 and self.verdict is not None and watch.seen is not None:
                    shown = shown_tokens(*watch.seen, rows.rows, self._run.known.oracle)
                    self.verdict = with_tokens(self.verdict, shown)
        except InputError as error:  # such as a tokenizer that is named and missing
            failure = f"the guard could not judge the run: {one_line(error)}"
        except Exception as error:
            log_crash(error)
        seconds = time.perf_counter() - started
        self._seconds += seconds
        self._pace.end_step(self._step, seconds)
        failures = failures_of_each(failure)
        if failures and self._settings.on_finding == "stop":
            raise_together(f"at {self._name}", failures, self.verdict)
        for rank, text in failures:
            _LOG.warning("process %d: the guard warns\n%s", rank, text)
        if self._step == 0 and not failures and self.verdict is not None and is_first_process():
            for line in (green_line(self.verdict, rows, rows.figures, seconds), *note_lines(self.verdict)):
                say(line)

    def _failure(self, rows: FirstRows, results: Mapping[str, Result], started: float) -> str:
        """Add what a step shows to the verdict; return the verdict if it is an error."""
        if self._step == 0:
            self.verdict = judge_run(
                self._run,
                rows,
                started,
                epoch=EpochRows("batches", rows),
                first_step=results,
                rules=self._settings.rules,
                objective=self._settings.objective,
            )
            return "" if self.verdict.ok else str(self.verdict)
        self.verdict, failure = with_later_step(
            self.verdict,
            self._run,
            rows,
            self._name,
            {LOSS: results[LOSS]},
            rules=self._settings.rules,
            objective=self._settings.objective,
        )
        return failure


def _without_wrappers(model: Any) -> tuple[Any, bool]:
    """Return the model in the wrappers of PyTorch, Accelerate or Fabric, and whether it is compiled."""
    is_compiled = False
    while True:
        inner = getattr(model, "_orig_mod", None)
        is_compiled |= inner is not None
        inner = getattr(model, "module", None) if inner is None else inner
        if not isinstance(inner, torch.nn.Module):
            return model, is_compiled
        model = inner
