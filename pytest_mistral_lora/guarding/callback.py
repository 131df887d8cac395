"""`guard(trainer)` and `MistralGuard`: stop a run, or warn, before the first step of any trainer of transformers."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from pytest_mistral_lora.chat.objective import Declaration
from pytest_mistral_lora.checkpoint.loaded_tokenizer import tokenizer_or_path
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.rule_set import RuleSet
from pytest_mistral_lora.errors import GuardError, InputError, MistralLoraError, one_line
from pytest_mistral_lora.escaping import safe_text
from pytest_mistral_lora.guarding.batches import (
    ModelBatch,
    RaisedError,
    first_rows,
    rows_of,
    size_of,
    tokenizer_of,
    undisturbed,
    why_watched,
)
from pytest_mistral_lora.guarding.evaluation import first_eval_rows
from pytest_mistral_lora.guarding.first_step import WAITING, FirstStepWatch, calling_trainer
from pytest_mistral_lora.guarding.process_copy import NoCopyError
from pytest_mistral_lora.guarding.verdict import (
    FirstRows,
    GuardedRow,
    GuardedRun,
    RowFigures,
    green_line,
    judge_run,
    judged_rows,
    with_first_step,
)
from pytest_mistral_lora.judging import AnyTokenizer, Verdict

_LOG = logging.getLogger(__name__)

OnFinding = Literal["stop", "warn"]

REPORTS = ("mistral-guard.json", "mistral-guard.html")
"""The files of the verdict in the output folder of a run that goes on."""


class MistralGuard(TrainerCallback):
    """Judges the first batches of a run, its model and its tokenizer before the first step.

    Give it to a trainer by `callbacks=[MistralGuard()]`, or call `guard(trainer)`, which also knows the trainer's
    dataset with the messages of the rows. The loss of the first step and the call of the model in it are judged in that
    step, before the optimizer moves a weight.

    The batches are taken from the trainer's own loader, after its collator, in a copy of the process: the run draws the
    same batches as without the guard. Batches that cannot be read so, such as those of a stream (an `IterableDataset`),
    are judged one by one as the model gets them, each before its own gradient.

    Attributes:
        verdict: The verdict; None before the run has begun.

    Args:
        tokenizer: The Mistral tokenizer, as for `audit`: a path or a name, or a tokenizer in memory. None for the
            trainer's `processing_class`, by its files or by its vocabulary.
        objective: The objective by which the labels are judged, such as `last-answer`, as for `judge`.
        batches: The number of batches to judge.
        on_finding: `stop` raises `GuardError` before a weight moves. `warn` logs the verdict, writes it to
            `mistral-guard.json` and `mistral-guard.html` in the output folder, and lets the run go on.
        rules: As for `judge`.

    Raises:
        InputError: If an argument has another value.

    Example:
        >>> from pytest_mistral_lora import MistralGuard
        >>> MistralGuard(tokenizer="spm-v3", batches=2, on_finding="warn").verdict is None
        True
    """

    def __init__(
        self,
        *,
        tokenizer: AnyTokenizer | None = None,
        objective: str | None = None,
        batches: int = 8,
        on_finding: OnFinding = "stop",
        rules: str | None = None,
    ) -> None:
        if tokenizer is not None:
            tokenizer_or_path(tokenizer)
        if type(batches) is not int or batches < 1:
            raise InputError(repr(batches), place="batches=", expected="a whole number, 1 or more")
        if on_finding not in ("stop", "warn"):
            raise InputError(repr(on_finding), place="on_finding=", expected="'stop' or 'warn'")
        self.verdict: Verdict | None = None
        self._rules = RuleSet.given(rules)
        self._objective = Declaration.given(objective)
        self._tokenizer = tokenizer
        self._batches = batches
        self._on_finding = on_finding
        self._trainer: Any = None
        self._watch: _BatchWatch | None = None
        self._step: FirstStepWatch | None = None
        self._first_step: Mapping[str, Result] = WAITING
        self._evaluation: FirstRows | None = None
        self._line: Callable[[Verdict], str] | None = None
        self._awaits_step = False

    def use_trainer(self, trainer: Any) -> None:
        """Take the messages of the rows from the dataset that a trainer has when its run begins."""
        self._trainer = trainer

    def use_declaration(self, declared: Declaration | None) -> None:
        """Judge the labels by the objective that a trainer's configuration declares; None if it declares nothing.

        Raises:
            InputError: If the guard was given another objective.
        """
        self._objective = Declaration.agreed(self._objective, declared)

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Judge the first batches, or begin to watch those that cannot be read ahead.

        Raises:
            GuardError: If a finding is an error, in any process, and the guard is to stop the run.
            Exception: What the dataset or the collator raises in one of these batches, with its place as a note.
        """
        started = time.perf_counter()
        self._end_watch()  # of an earlier training that was stopped
        self.verdict, self._first_step, self._line = None, WAITING, None
        self._awaits_step = True
        raised = None
        try:
            trainer = calling_trainer(self) if self._trainer is None else self._trainer
            tokenizer = tokenizer_of(getattr(train_dataloader, "collate_fn", None))
            run = GuardedRun(args, model, processing_class, self._tokenizer, tokenizer)
            with undisturbed(getattr(args, "device", None)):
                read, reason, raised = self._read_ahead(args, state, train_dataloader)
                # no process goes on alone: the others would wait for it
                reasons, failed = zip(*_from_each_process((reason, raised is not None)), strict=True)
                if any(failed):
                    _LOG.debug("a process ends with an error of its rows")
                else:
                    self._evaluation = first_eval_rows(trainer, self._batches)
                    if read is None or any(reasons):
                        reason = next(filter(None, reasons))
                        self._watch = _BatchWatch(self, run, model, reason, size_of(train_dataloader))
                    else:
                        self._judge(run, read, started)
                    self._step = FirstStepWatch(args, model, trainer)
        except GuardError:
            raise
        except Exception as error:
            _log_crash(error)
        if raised is not None:
            raise raised

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what the first step trains for: its gradients are there, and no weight has moved.

        Raises:
            GuardError: As for `on_train_begin`.
        """
        if self._awaits_step:
            self._awaits_step = False
            self._judge_first_step(args)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what the run has given, if it had fewer batches than the guard judges.

        Raises:
            GuardError: As for `on_train_begin`.
        """
        if self._watch is not None:
            self._watch.end()
        self._end_watch()
        self._print_line()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self._step is not None:
            self._step.leave()
            self._step = None

    def _judge_first_step(self, args: Any) -> None:
        """Add what the first step has shown to the verdict, exchange the outcome with other processes, stop or warn.

        Args:
            args: The `TrainingArguments`.
        """
        failure = ""
        try:
            if self._step is not None:
                self._first_step = self._step.results()
                self._step = None
            findings = [finding for result in self._first_step.values() for finding in result.findings]
            is_error = any(finding.severity == "error" for finding in findings)
            # rows that are judged later have these results with them
            if self.verdict is not None or (is_error and self._watch is None):
                self.verdict = with_first_step(self.verdict, self._first_step, self._rules)
            if is_error:
                failure = str(self.verdict or "\n".join(map(str, findings)))
        except Exception as error:
            _log_crash(error)
        failures = [(rank, text) for rank, text in enumerate(_from_each_process(failure)) if text]
        if failures and self._on_finding == "stop":
            raise GuardError(_stopped("before a weight moves", failures), verdict=self.verdict)
        if self._on_finding == "warn":
            self._warn(args, failures)
        if failures:
            self._line = None
        self._print_line()

    def _print_line(self) -> None:
        """Print the line of a run that goes on, once."""
        line, self._line = self._line, None
        try:
            if line is not None and self.verdict is not None:
                _say(line(self.verdict))
        except Exception as error:
            _log_crash(error)

    def _read_ahead(self, args: Any, state: Any, loader: Any) -> tuple[FirstRows | None, str, Exception | None]:
        """Return the rows of the next batches, or why they cannot be read ahead, or what the dataset has raised."""
        try:
            reason = why_watched(loader)
            return (None, reason, None) if reason else (self._read(args, state, loader), "", None)
        except NoCopyError as error:
            return None, error.reason, None
        except RaisedError as found:
            return None, "", found.error
        except Exception as error:  # ours
            return None, f"reading ahead ended with {type(error).__name__}: {one_line(error)}", None

    def _read(self, args: Any, state: Any, loader: Any) -> FirstRows:
        """Return the rows of the next batches; a resumed run begins within an epoch."""
        dataset = loader.dataset if self._trainer is None else getattr(self._trainer, "train_dataset", None)
        accumulation = getattr(args, "gradient_accumulation_steps", 1)
        epoch = done = 0
        if state.global_step:
            epoch, done = divmod(state.global_step, max(-(-len(loader) // accumulation), 1))
        skipped = 0 if getattr(args, "ignore_data_skip", False) else done * accumulation
        return first_rows(loader, dataset, self._batches, epoch=epoch, skipped=skipped)

    def _judge(
        self,
        run: GuardedRun,
        read: FirstRows,
        started: float,
        moment: str = "before a weight moves",
        *,
        last: bool = True,
    ) -> None:
        """Judge rows, exchange the outcome with the other processes, and stop at this moment or warn.

        Args:
            run: The run.
            read: The rows.
            started: The time of `time.perf_counter` at which the guard began.
            moment: When the run is stopped, in words.
            last: Whether no more rows are judged after them.
        """
        failure = ""
        try:
            read = judged_rows(run, read)
            evaluation = None
            if self._evaluation is not None and (last or self.verdict is None):
                evaluation = judged_rows(run, self._evaluation)
            self.verdict = judge_run(
                run,
                read,
                started,
                evaluation=evaluation,
                first_step=self._first_step,
                rules=self._rules,
                objective=self._objective,
            )
            if any(finding.severity == "error" for finding in self.verdict.findings):
                failure = str(self.verdict)
        except InputError as error:  # such as a tokenizer that is named and missing
            self.verdict, failure = None, f"the guard could not judge the run: {one_line(error)}"
        except Exception as error:
            _log_crash(error)
            self.verdict = None
        outcomes = _from_each_process((failure, read.figures))
        failures = [(rank, text) for rank, (text, _) in enumerate(outcomes) if text]
        if failures and self._on_finding == "stop":
            raise GuardError(_stopped(moment, failures), verdict=self.verdict)
        if not last or getattr(run.args, "process_index", 0) != 0:
            return
        if self._on_finding == "warn":
            self._warn(run.args, failures)
        if self.verdict is not None and not failures:
            judged = RowFigures(*map(sum, zip(*(figures for _, figures in outcomes), strict=True)))
            seconds = time.perf_counter() - started
            self._line = lambda verdict: green_line(verdict, read, judged, seconds, self._evaluation)
            if self._first_step is not WAITING:
                self._print_line()

    def _warn(self, args: Any, failures: Sequence[tuple[int, str]]) -> None:
        process = getattr(args, "process_index", 0)
        for rank, text in failures:
            if process in (0, rank):
                _LOG.warning("process %d: the guard warns\n%s", rank, text)
        if self.verdict is None or process != 0:
            return
        folder = Path(getattr(args, "output_dir", None) or ".")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in REPORTS:
                self.verdict.write(folder / name)
        except (OSError, MistralLoraError) as error:
            _LOG.warning("the guard's verdict cannot be written to %s: %s", folder, one_line(error))


class _BatchWatch:
    """Judges the batches of a run as the model gets them, in training mode."""

    def __init__(self, guard: MistralGuard, run: GuardedRun, model: Any, reason: str, size: int | None) -> None:
        self._guard, self._run, self._reason, self._size = guard, run, reason, size
        self._rows: list[GuardedRow] = []
        self._seen = 0
        self._seconds = 0.0
        self._hook = model.register_forward_pre_hook(self._take, with_kwargs=True)

    def remove(self) -> None:
        """Watch no more batches."""
        self._hook.remove()

    def end(self) -> None:
        """Judge the rows so far, if the guard waits for more.

        Raises:
            GuardError: As for `MistralGuard.on_train_end`.
        """
        if self._seen < self._guard._batches:
            self._judge(self._rows)

    def _take(self, model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not model.training:
            return
        data = named if "input_ids" in named or not given else {**named, "input_ids": given[0]}
        rows = []
        try:
            rows = rows_of(ModelBatch(data), self._seen)
        except Exception as error:
            _log_crash(error)
        self._rows += rows
        self._seen += 1
        if self._seen == self._guard._batches:
            self.remove()
            self._judge(self._rows)
        elif self._guard._on_finding == "stop":
            self._judge(rows, last=False)

    def _judge(self, rows: list[GuardedRow], *, last: bool = True) -> None:
        # earlier batches may have moved weights
        moment = "before a weight moves" if self._seen == 1 else f"at batch {self._seen} of its stream"
        read = FirstRows(rows, self._seen, self._size, self._reason)
        started = time.perf_counter() - self._seconds
        try:
            with undisturbed(getattr(self._run.args, "device", None)):
                self._guard._judge(self._run, read, started, moment, last=last)
        except GuardError:
            raise
        except Exception as error:
            _log_crash(error)
        self._seconds = time.perf_counter() - started


def _log_crash(error: Exception) -> None:
    """Log an error of the guard itself, with which the run goes on."""
    _LOG.warning("not checked: the guard ended with %s: %s", type(error).__name__, one_line(error))
    _LOG.debug("the error of the guard", exc_info=error)


def _stopped(moment: str, failures: Sequence[tuple[int, str]]) -> str:
    """Return why a run is stopped at a moment, in words: the text of the first process that found an error."""
    rank, text = failures[0]
    of_process = f" (process {rank} of {_processes()})" if _processes() > 1 else ""
    return f"the run is stopped {moment}{of_process}\n{text}"


def _say(line: str) -> None:
    """Print a line, if there is somewhere to print it to."""
    with suppress(AttributeError, OSError, ValueError):
        sys.stdout.write(f"{safe_text(line)}\n")
        sys.stdout.flush()


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _from_each_process(value: Any) -> list[Any]:
    """Return a value of each process, in the order of their ranks; every process must call it."""
    if _processes() == 1:
        return [value]
    found: list[Any] = [None] * _processes()
    torch.distributed.all_gather_object(found, value)
    return found


def guard(
    trainer: Any,
    *,
    tokenizer: AnyTokenizer | None = None,
    objective: str | None = None,
    batches: int = 8,
    on_finding: OnFinding = "stop",
    rules: str | None = None,
) -> MistralGuard:
    """Let a trainer judge its first batches, its model and its tokenizer before the first step.

    Call it before `trainer.train()`.

    Args:
        trainer: A `transformers.Trainer`, or a trainer that is made from it, such as an `SFTTrainer`.
        tokenizer: As for `MistralGuard`.
        objective: As for `MistralGuard`.
        batches: As for `MistralGuard`.
        on_finding: As for `MistralGuard`.
        rules: As for `MistralGuard`.

    Returns:
        The guard. After the start of the run, its `verdict` is the verdict.

    Raises:
        InputError: If the trainer takes no callback, or an argument has another value.

    Example:
        >>> from pytest_mistral_lora import guard
        >>> guard("my trainer")
        Traceback (most recent call last):
        ...
        pytest_mistral_lora.errors.InputError: trainer: a str; expected a transformers.Trainer
    """
    if not hasattr(trainer, "add_callback"):
        raise InputError(f"a {type(trainer).__name__}", place="trainer", expected="a transformers.Trainer")
    callback = MistralGuard(
        tokenizer=tokenizer, objective=objective, batches=batches, on_finding=on_finding, rules=rules
    )
    callback.use_trainer(trainer)
    trainer.add_callback(callback)
    return callback
