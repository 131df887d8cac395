"""A run, judged as it goes on: before its first step, at its first batches and steps, and at some later steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin, trainer_utils

from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.errors import InputError, MistralLoraError, counted, one_line
from pytest_mistral_lora.guarding.batches import (
    BatchSources,
    ModelBatch,
    NextBatches,
    RaisedError,
    next_batches,
    rows_of,
    tokenizer_of,
    undisturbed,
)
from pytest_mistral_lora.guarding.epoch import EpochRows
from pytest_mistral_lora.guarding.evaluation import first_eval_rows
from pytest_mistral_lora.guarding.first_batch import shown_tokens
from pytest_mistral_lora.guarding.learning import LearningWatch
from pytest_mistral_lora.guarding.pace import Pace
from pytest_mistral_lora.guarding.processes import failures_of_each, from_each_process, log_crash, raise_together, say
from pytest_mistral_lora.guarding.rows import FirstRows, GuardedRow, RowFigures
from pytest_mistral_lora.guarding.settings import GuardSettings
from pytest_mistral_lora.guarding.steps import LOSS, WAITING, TrainerWatch
from pytest_mistral_lora.guarding.verdict import (
    GuardedRun,
    green_line,
    judge_run,
    judged_rows,
    note_lines,
    of_step,
    with_later_step,
    with_results,
    with_tokens,
)
from pytest_mistral_lora.judging import Verdict

_LOG = logging.getLogger(__name__)

REPORTS = ("mistral-guard.json", "mistral-guard.html")
"""The files of the verdict in the output folder of a run that goes on."""

_PREFETCHED = 2
"""The batches that a loader of accelerate makes before the model gets the one before, and one to spare."""

_DIFFERS = "a batch is not the one that was made before the run: its rows change with each look"


class RunJudge:
    """Judges one training of a trainer.

    Attributes:
        verdict: The verdict so far; None before there is one.
    """

    def __init__(self, settings: GuardSettings, args: Any, model: Any, processing_class: Any, loader: Any) -> None:
        """Begin with nothing judged.

        Args:
            settings: What the guard was told.
            args: The `TrainingArguments`.
            model: The model, without wrappers.
            processing_class: The tokenizer or processor.
            loader: The training loader.
        """
        self.verdict: Verdict | None = None
        self._settings, self._args, self._loader = settings, args, loader
        padder = tokenizer_of(getattr(loader, "collate_fn", None))
        self._run = GuardedRun(args, model, processing_class, settings.tokenizer, padder)
        self._watch: TrainerWatch | None = None
        self._learning: LearningWatch | None = None
        self._learned: str | None = None
        self._ahead = NextBatches()
        self._sources: BatchSources | None = None
        self._rows: list[list[GuardedRow]] = []
        self._evaluation: FirstRows | None = None
        self._first_step: Mapping[str, Result] = WAITING
        self._watched = ""
        self._seen = self._step = 0
        self._pace = Pace(settings.every, 0)
        self._late: list[GuardedRow] | None = None
        self._late_steps: list[str] = []
        self._said: set[str] = set()
        self._are_rows_judged = self._is_step_judged = self._is_learning_judged = self._is_left = False
        self._started = self._seconds = 0.0
        self._line: Callable[[Verdict], str] | None = None

    def begin(self, state: Any, trainer: Any) -> None:
        """Judge the next batches, the model and the tokenizer, and begin to watch the steps.

        Args:
            state: The `TrainerState`.
            trainer: The trainer; None if it is unknown.

        Raises:
            GuardError: If a finding is an error, in any process, and the guard is to stop the run.
            RaisedError: If the dataset or the collator raises an exception in one of these batches.
        """
        self._pace = Pace(self._settings.every, state.global_step)
        dataset = self._loader.dataset if trainer is None else getattr(trainer, "train_dataset", None)
        raised: RaisedError | None = None
        with self._apart():
            try:
                self._learning = LearningWatch(self._args, self._run.model, trainer, state)
                self._first_step = {**self._first_step, **self._learning.results()}
            except Exception as error:
                log_crash(error)
            try:
                self._ahead = next_batches(
                    self._loader, dataset, self._settings.batches, **_place_in_epoch(self._args, state, self._loader)
                )
            except RaisedError as error:
                raised = error
            except Exception as error:  # ours
                self._ahead = NextBatches(reason=f"reading ahead ended with {type(error).__name__}: {one_line(error)}")
            # no process goes on alone: the others would wait for it
            reasons, failed = zip(*from_each_process((self._ahead.reason, raised is not None)), strict=True)
            if not any(failed):
                self._ahead = replace(self._ahead, reason=next(filter(None, reasons), ""))
                self._watched = self._ahead.reason
                self._evaluation = first_eval_rows(trainer, self._settings.batches)
                if not self._ahead.reason:
                    self._rows = [rows_of(batch, number) for number, batch in enumerate(self._ahead.batches)]
                    left = islice(self._ahead.rest, _batches_left(self._args, state, len(self._rows)))
                    self._judge_rows(self._rows, "before a weight moves", is_last=True, rest=left)
                accumulation = getattr(self._args, "gradient_accumulation_steps", 1)
                self._sources = BatchSources(self._loader, dataset, self._ahead.order, accumulation + _PREFETCHED)
                self._watch = TrainerWatch(self._args, self._run.model, trainer, self._take)
                self._watch.begin_step(is_judged=True)
        if raised is not None:
            raise raised

    def begin_step(self, step: int) -> None:
        """Begin a step, which is judged if its number says so: in each process, it is the same steps.

        Args:
            step: The number of steps before it.
        """
        self._step, self._late = step, None
        if self._is_step_judged:
            self._pace.begin_step(step, self._seconds)
            if self._watch is not None:
                self._watch.begin_step(is_judged=self._pace.is_judged(step), name=f"step {step + 1}")

    def judge_step(self) -> None:
        """Judge what a step has shown, exchange the outcome with the other processes, stop or warn.

        Raises:
            GuardError: As for `begin`.
        """
        if not self._is_step_judged:
            self._judge_first_step()
        elif not self._is_left and self._pace.is_judged(self._step):  # even if this process watches nothing
            self._judge_later_step()

    def _judge_later_step(self) -> None:
        """Judge the gradient of a later step and its first batch, unless that was judged before."""
        name, seconds = f"step {self._step + 1}", self._seconds
        failure = self._attempted(partial(self._failure_of, name))
        self._pace.end_step(self._step, self._seconds - seconds)
        failures = failures_of_each(failure)
        before = f"judged before it: {self._late_steps[-1] if self._late_steps else 'the first step'}"
        moment = f"at {name}, before its weights move; {before}; {_last_checkpoint(self._args, self._step)}"
        self._late_steps.append(name)
        self._stop_or_warn(moment, failures, is_last=bool(failures))

    def _failure_of(self, name: str) -> str:
        """Add what a later step shows for the first time to the verdict; return the verdict if it is an error."""
        if self._watch is None:
            return ""
        self.verdict, failure = with_later_step(
            self.verdict,
            self._run,
            FirstRows(self._late or [], 1, self._ahead.size, sample=self._ahead.sample),
            name,
            {LOSS: self._watch.results()[LOSS]},
            rules=self._settings.rules,
            objective=self._settings.objective,
        )
        return failure

    def _judge_first_step(self) -> None:
        """Add what the first step has shown to the verdict."""
        self._is_step_judged = True
        failures = failures_of_each(self._attempted(self._failure_of_first))
        self._stop_or_warn("before a weight moves", failures, is_last=True)
        if failures:
            self._line = None

    def _failure_of_first(self) -> str:
        """Add what the first step has shown to the verdict; return the verdict if that is an error."""
        failure = self._with_results({} if self._watch is None else self._watch.results())
        if self.verdict is not None:
            self.verdict = with_tokens(self.verdict, self._shown())
        return failure

    def look_at_step(self, optimizer: Any) -> None:
        """Look at the gradients of one of the first steps, before the optimizer moves a weight."""
        if self._learning is not None and not self._learning.is_done:
            with self._apart():
                self._learning.before_step(optimizer)

    def judge_learning(self, optimizer: Any = None, *, is_last: bool = False) -> None:
        """Judge what the first steps have moved, once they have in each process; then stop or warn.

        Args:
            optimizer: The optimizer, after a step.
            is_last: Whether the run has no more steps.

        Raises:
            GuardError: As for `begin`.
        """
        if self._is_learning_judged or self._is_left:
            return
        watch = self._learning
        with self._apart():
            if watch is not None and is_last:
                watch.leave()
            elif watch is not None:
                watch.after_step(optimizer)
        # even if this process watches nothing, the others wait for it
        if self._learned is None and (watch is None or watch.is_done):
            self._learned = self._attempted(lambda: self._with_results({} if watch is None else watch.moved()))
        learned = from_each_process(self._learned)
        if None in learned:
            return
        self._is_learning_judged = True
        failures = [(rank, text) for rank, text in enumerate(learned) if text]
        self._stop_or_warn("after the first steps", failures, is_last=True)
        if failures:
            self._line = None
        self._print_line()

    def _with_results(self, found: Mapping[str, Result]) -> str:
        """Add results of steps to the verdict, and return it if one of them is an error."""
        self._first_step = {**self._first_step, **found}
        # what was known before is in the verdict, if there is one
        new = self._first_step if self.verdict is None else found
        is_error = any(finding.severity == "error" for result in new.values() for finding in result.findings)
        # rows that are judged later have these results with them
        if not new or (self.verdict is None and not is_error):
            return ""
        self.verdict = with_results(self.verdict, "trainer", of_step(new), self._settings.rules)
        return str(self.verdict) if is_error else ""

    def _attempted(self, judge: Callable[[], str]) -> str:
        """Return what a judgement returns, apart from the run; empty after an error of the guard itself."""
        with self._apart():
            try:
                return judge()
            except Exception as error:
                log_crash(error)
        return ""

    def _shown(self) -> Iterator[TokenRow]:
        """Yield the rows of the first batch for the page of tokens."""
        if self._watch is not None and self._watch.seen is not None and self._rows:
            yield from shown_tokens(*self._watch.seen, self._rows[0], self._run.known.oracle)

    def rehearse(self, trainer: Any) -> None:
        """Judge a run as far as its first step, with the gradient of its first batch, and move no weight.

        Args:
            trainer: The trainer, which is not training.

        Raises:
            GuardError: As for `begin`.
            RaisedError: As for `begin`.
        """
        try:
            with _aligned(trainer):
                self.begin(trainer.state, trainer)
            with undisturbed(trainer.args.device), _without_gradients(trainer.model), _checkpointed(trainer):
                trainer.current_gradient_accumulation_steps = 1  # as `train` sets it
                batches, items = trainer.get_batch_samples(iter(self._loader), 1, trainer.args.device)
                if batches:
                    trainer.training_step(trainer.model, batches[0], items)
                self.judge_step()
            self.judge_learning(is_last=True)
            self._judge_remaining("before a weight moves")
        finally:
            self.leave()
        self._print_line()

    def end(self) -> None:
        """Judge what the run has given, if it had fewer batches than the guard judges, and watch no more.

        Raises:
            GuardError: As for `begin`.
        """
        try:
            self.judge_learning(is_last=True)
            if self._watch is not None:
                self._judge_remaining("at its end")
        finally:
            self.leave()
        self._print_line()
        if self._late_steps and self._is_first_process:
            count = counted(len(self._late_steps), "later step")
            say(f"mistral guard: {count} judged{self._pace.words}")
            self._say_notes()

    def _judge_remaining(self, moment: str) -> None:
        """Judge all rows so far at a moment, in words, unless no more were to come."""
        if not self._are_rows_judged:
            with self._apart():
                self._judge_rows(self._rows, moment, is_last=True)

    def leave(self) -> None:
        """Watch the run no more."""
        self._is_left = True
        if self._watch is not None:
            self._watch.leave()
            self._watch = None
        if self._sources is not None:
            self._sources.leave()
            self._sources = None
        if self._learning is not None:
            self._learning.leave()

    def _take(self, data: Any) -> None:
        """Judge one of the first batches, unless it is one that was judged before the first step."""
        number = self._seen
        self._seen += 1
        if number >= self._settings.batches:
            self._take_late(number, data)
            return
        with self._apart():
            rows = None
            try:
                rows = self._rows_if_new(number, data)
            except Exception as error:
                log_crash(error)
                rows = []
            if rows is not None:
                self._rows[number : number + 1] = [rows]
                self._watched = self._watched or _DIFFERS
            if any(from_each_process(rows is not None)):
                self._are_rows_judged = False
                is_last = self._seen == self._settings.batches
                if is_last or self._settings.on_finding == "stop":
                    moment = f"at batch {self._seen}" if self._is_step_judged else "before a weight moves"
                    self._judge_rows(self._rows if is_last else self._rows[number:], moment, is_last=is_last)

    def _take_late(self, number: int, data: Any) -> None:
        """Keep the rows of the first batch of a later step, if the step is judged."""
        if self._late is not None or not self._is_step_judged or not self._pace.is_judged(self._step):
            return
        self._late = []
        with self._apart():
            try:
                sources = () if self._sources is None else self._sources.of(number, data)
                self._late = rows_of(ModelBatch(data, sources), number)
            except Exception as error:
                log_crash(error)

    def _rows_if_new(self, number: int, data: Mapping[str, Any]) -> list[GuardedRow] | None:
        """Return the rows of a batch that the model gets; None if they were judged before the first step."""
        if self._ahead.reason:
            sources = () if self._sources is None else self._sources.of(number, data)
            return rows_of(ModelBatch(data, sources), number)
        expected = self._ahead.batches[number] if number < len(self._ahead.batches) else ModelBatch({})
        return None if expected.is_fed(data) else rows_of(ModelBatch(data, expected.sources), number)

    def _judge_rows(
        self,
        batches: Sequence[Sequence[GuardedRow]],
        moment: str,
        *,
        is_last: bool,
        rest: Iterable[ModelBatch] = (),
    ) -> None:
        """Judge the rows of batches, exchange the outcome with the other processes, and stop at this moment or warn.

        Args:
            batches: The rows of each batch.
            moment: When the run is stopped, in words.
            is_last: Whether no more rows are judged after them.
            rest: Batches behind these, which are judged as long as there is time.
        """
        self._are_rows_judged = is_last
        rows = [row for batch in batches for row in batch]
        read = FirstRows(
            rows, len(batches), self._ahead.size, self._watched, left_out=self._left_out, sample=self._ahead.sample
        )
        evaluation = self._evaluation if is_last or self.verdict is None else None
        failure, epoch = "", EpochRows("batches", read)
        try:
            read = judged_rows(self._run, read)
            is_shown = self._is_first_process and not getattr(self._args, "disable_tqdm", False)
            epoch = EpochRows("batches", read, rest, partial(judged_rows, self._run), is_shown=is_shown)
            self.verdict = judge_run(
                self._run,
                read,
                self._started,
                epoch=epoch,
                evaluation=None if evaluation is None else judged_rows(self._run, evaluation),
                first_step=self._first_step,
                rules=self._settings.rules,
                objective=self._settings.objective,
            )
            if any(finding.severity == "error" for finding in self.verdict.findings):
                failure = str(self.verdict)
        except InputError as error:  # such as a tokenizer that is named and missing
            self.verdict, failure = None, f"the guard could not judge the run: {one_line(error)}"
        except Exception as error:
            log_crash(error)
            self.verdict = None
        outcomes = from_each_process((failure, read.figures.with_more(epoch.figures)))
        failures = [(rank, text) for rank, (text, _) in enumerate(outcomes) if text]
        self._stop_or_warn(moment, failures, is_last=is_last)
        if self.verdict is not None and is_last and not failures and self._is_first_process:
            judged = RowFigures(*map(sum, zip(*(figures for _, figures in outcomes), strict=True)))
            seconds = time.perf_counter() - self._started
            why = epoch.reason
            self._line = lambda verdict: green_line(verdict, read, judged, seconds, evaluation, why_not_all=why)
            if self._is_learning_judged:
                self._print_line()

    @property
    def _left_out(self) -> dict[str, str]:
        """Why the run has shown no batch, by the case of its rows; empty if it has, or had none."""
        if self._rows or self._watch is None:
            return {}
        reason = self._watch.why_no_batches
        if not reason and self._is_step_judged:
            reason = "the trainer does not call its compute_loss"
        return {"rows": reason} if reason else {}

    def _stop_or_warn(self, moment: str, failures: Sequence[tuple[int, str]], *, is_last: bool) -> None:
        """Stop the run for the failures of processes, or log them and write the verdict.

        Args:
            moment: When the run is stopped, in words.
            failures: The rank and the verdict of each process that found an error.
            is_last: Whether nothing more is judged at this place.

        Raises:
            GuardError: If there are failures, and the guard is to stop the run.
        """
        if failures and self._settings.on_finding == "stop":
            self.leave()
            raise_together(moment, failures, self.verdict)
        if self._settings.on_finding != "warn" or not is_last:
            return
        for rank, text in failures:
            if self._is_first_process or rank == self._args.process_index:
                _LOG.warning("process %d: the guard warns\n%s", rank, text)
        if self.verdict is None or not self._is_first_process:
            return
        folder = Path(getattr(self._args, "output_dir", None) or ".")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in REPORTS:
                self.verdict.write(folder / name)
        except (OSError, MistralLoraError) as error:
            _LOG.warning("the guard's verdict cannot be written to %s: %s", folder, one_line(error))

    @property
    def _is_first_process(self) -> bool:
        return getattr(self._args, "process_index", 0) == 0

    def _print_line(self) -> None:
        """Print the line of a run that goes on, once."""
        line, self._line = self._line, None
        try:
            if line is not None and self.verdict is not None:
                say(line(self.verdict))
                self._say_notes()
        except Exception as error:
            log_crash(error)

    def _say_notes(self) -> None:
        """Print a line for each note, once."""
        if self.verdict is not None and self._is_first_process:
            for line in note_lines(self.verdict):
                if line not in self._said:
                    say(line)
                self._said.add(line)

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """Restore the random states of the run at the end, and count the seconds."""
        self._started = time.perf_counter() - self._seconds
        try:
            with undisturbed(getattr(self._args, "device", None)):
                yield
        finally:
            self._seconds = time.perf_counter() - self._started


@contextmanager
def _without_gradients(model: Any) -> Iterator[None]:
    """Give the parameters of a model their gradients back at the end, and its modules their mode."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for module, mode in modes:
            module.training = mode


@contextmanager
def _aligned(trainer: Any) -> Iterator[None]:
    """Give the configurations of a model the special tokens of the tokenizer, as `train` does before its first step."""
    config = getattr(trainer.model, "config", None)
    text = None if config is None or not hasattr(config, "get_text_config") else config.get_text_config()
    configs = [one for one in (config, text, getattr(trainer.model, "generation_config", None)) if one is not None]
    kept = [(one, dict(vars(one))) for one in configs]
    align = getattr(trainer, "_align_special_tokens", None)  # before transformers 5
    if align is None and (function := getattr(trainer_utils, "align_special_tokens", None)) is not None:
        align = partial(function, trainer.model, trainer.processing_class)
    if align is not None and isinstance(trainer.processing_class, PreTrainedTokenizerBase | ProcessorMixin):
        align()
    try:
        yield
    finally:
        for one, attributes in kept:
            vars(one).clear()
            vars(one).update(attributes)


@contextmanager
def _checkpointed(trainer: Any) -> Iterator[None]:
    """Compute layers anew in the backward pass, if the run does: that decides whether there is a key-value cache."""
    args, model = trainer.args, trainer.model
    is_needed = getattr(args, "gradient_checkpointing", False) and not getattr(model, "is_gradient_checkpointing", True)
    # transformers leaves a hook at the embeddings of a model with an adapter
    hooks = [(module._forward_hooks, set(module._forward_hooks)) for module in model.modules()]
    if is_needed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    try:
        yield
    finally:
        if is_needed:
            model.gradient_checkpointing_disable()
        for found, known in hooks:
            for key in found.keys() - known:
                del found[key]


def _place_in_epoch(args: Any, state: Any, loader: Any) -> dict[str, int]:
    """Return the epoch in which a run begins, and the batches that it skips: a resumed run begins within an epoch."""
    if not state.global_step:
        return {}
    accumulation = getattr(args, "gradient_accumulation_steps", 1)
    epoch, done = divmod(state.global_step, max(-(-len(loader) // accumulation), 1))
    return {"epoch": epoch, "skipped": 0 if getattr(args, "ignore_data_skip", False) else done * accumulation}


def _batches_left(args: Any, state: Any, made: int) -> int | None:
    """Return how many batches a run takes at most behind those that were made; None for all."""
    steps = getattr(state, "max_steps", 0) or getattr(args, "max_steps", 0)
    accumulation: int = getattr(args, "gradient_accumulation_steps", 1)
    return max(int(steps - state.global_step) * accumulation - made, 0) if steps > 0 else None


def _last_checkpoint(args: Any, step: int) -> str:
    """Return the words for the last checkpoint of a run before a step."""
    folder = Path(getattr(args, "output_dir", None) or ".")
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    before = [number for number in steps if number <= step]
    return f"the last checkpoint is {folder / f'checkpoint-{max(before)}'}" if before else "there is no checkpoint"
