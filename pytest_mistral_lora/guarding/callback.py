"""`guard(trainer)` and `MistralGuard`: stop a run, or warn, before the first step of any trainer of transformers."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from pytest_mistral_lora.errors import GuardError, InputError, MistralLoraError, one_line
from pytest_mistral_lora.guarding.batches import (
    ModelBatch,
    can_be_read_twice,
    first_batches,
    undisturbed,
    with_messages,
)
from pytest_mistral_lora.guarding.verdict import GuardedRow, GuardedRun, judge_run
from pytest_mistral_lora.judging import Verdict

_LOG = logging.getLogger(__name__)

OnFinding = Literal["stop", "warn"]

REPORTS = ("mistral-guard.json", "mistral-guard.html")
"""The files of the verdict in the output folder of a run that goes on."""


class MistralGuard(TrainerCallback):
    """Judges the first batches of a run, its model and its tokenizer before the first step.

    Give it to a trainer by `callbacks=[MistralGuard()]`, or call `guard(trainer)`, which also knows the trainer's
    dataset with the messages of the rows.

    The batches are taken from the trainer's own loader, after its collator, and the run draws the same batches as
    without the guard. A stream (an `IterableDataset`) cannot be read twice: its batches are judged one by one as the
    model gets them, each before its own gradient.

    Attributes:
        verdict: The verdict; None before the run has begun.

    Args:
        tokenizer: The Mistral tokenizer, as for `audit`; None for the trainer's `processing_class`, by its files or by
            its vocabulary.
        batches: The number of batches to judge.
        on_finding: `stop` raises `GuardError` before a weight moves. `warn` logs the verdict, writes it to
            `mistral-guard.json` and `mistral-guard.html` in the output folder, and lets the run go on.

    Raises:
        InputError: If an argument has another value.

    Example:
        >>> from pytest_mistral_lora import MistralGuard
        >>> MistralGuard(tokenizer="spm-v3", batches=2, on_finding="warn").verdict is None
        True
    """

    def __init__(
        self, *, tokenizer: str | Path | None = None, batches: int = 8, on_finding: OnFinding = "stop"
    ) -> None:
        if type(batches) is not int or batches < 1:
            raise InputError(repr(batches), place="batches=", expected="a whole number, 1 or more")
        if on_finding not in ("stop", "warn"):
            raise InputError(repr(on_finding), place="on_finding=", expected="'stop' or 'warn'")
        self.verdict: Verdict | None = None
        self._tokenizer = tokenizer
        self._batches = batches
        self._on_finding = on_finding
        self._dataset: Any = None
        self._stream: _StreamWatch | None = None

    def use_dataset(self, dataset: Any) -> None:
        """Take the messages of the rows from the trainer's dataset, if it has them beside its ids."""
        self._dataset = dataset

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        processing_class: Any = None,
        train_dataloader: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Judge the first batches, or begin to watch a stream.

        Raises:
            GuardError: If the verdict is not ok, in any process, and the guard is to stop the run.
        """
        run = GuardedRun(args, model, processing_class, optimizer, self._tokenizer, self._dataset)
        if not can_be_read_twice(train_dataloader):
            self._stream = _StreamWatch(self, run, model)
            return
        with undisturbed(train_dataloader, args.device):
            started = time.perf_counter()
            self._judge(run, lambda: self._read(args, state, train_dataloader), started)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge what a stream has given, if it had fewer batches than the guard judges."""
        if self._stream is not None:
            self._stream.end()
            self._stream = None

    def _read(self, args: Any, state: Any, loader: Any) -> list[GuardedRow]:
        """Return the rows of the next batches; a resumed run begins within an epoch."""
        accumulation = args.gradient_accumulation_steps
        updates = max(-(-len(loader) // accumulation), 1)
        epoch, done = divmod(state.global_step, updates)
        skipped = 0 if args.ignore_data_skip else done * accumulation
        found = first_batches(loader, self._batches, epoch=epoch, skipped=skipped)
        return [row for number, batch in enumerate(found) for row in rows_of(batch, number, self._dataset)]

    def _judge(self, run: GuardedRun, read: Any, started: float, moment: str = "before a weight moves") -> None:
        """Judge rows, exchange the outcome with the other processes, and stop at this moment or warn."""
        failure = ""
        try:
            self.verdict = judge_run(run, read(), started)
            failure = "" if self.verdict.ok else str(self.verdict)
        except Exception as error:  # a process that ended alone would leave the others waiting
            if not isinstance(error, MistralLoraError):
                _LOG.exception("the guard ended with an error")
            self.verdict = None
            failure = f"the guard could not judge the run: {one_line(error) or type(error).__name__}"
        failures = [(rank, text) for rank, text in enumerate(_from_each_process(failure)) if text]
        if self._on_finding == "warn":
            self._warn(run, failures)
        elif failures:
            rank, text = failures[0]
            of_process = f" (process {rank} of {_processes()})" if _processes() > 1 else ""
            raise GuardError(f"the run is stopped {moment}{of_process}\n{text}", verdict=self.verdict)
        elif self.verdict is not None and run.args.process_index == 0:
            _LOG.info("%r", self.verdict)

    def _warn(self, run: GuardedRun, failures: Sequence[tuple[int, str]]) -> None:
        if run.args.process_index != 0:
            return
        for rank, text in failures:
            _LOG.warning("process %d: the guard warns\n%s", rank, text)
        if self.verdict is None:
            return
        folder = Path(run.args.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in REPORTS:
                self.verdict.write(folder / name)
        except (OSError, MistralLoraError) as error:
            _LOG.warning("the guard's verdict cannot be written to %s: %s", folder, one_line(error))


class _StreamWatch:
    """Judges the batches of a stream as the model gets them, in training mode."""

    def __init__(self, guard: MistralGuard, run: GuardedRun, model: Any) -> None:
        self._guard, self._run = guard, run
        self._rows: list[GuardedRow] = []
        self._seen = 0
        self._hook = model.register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, model: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not model.training:
            return
        data = named if "input_ids" in named or not given else {**named, "input_ids": given[0]}
        rows = rows_of(ModelBatch(data), self._seen, None)
        self._seen += 1
        is_last = self._seen == self._guard._batches
        if self._guard._on_finding == "warn":
            self._rows += rows
        if is_last:
            self._hook.remove()
        if self._guard._on_finding == "stop":
            self._judge(rows)
        elif is_last:
            self.end()

    def end(self) -> None:
        """Judge the rows that are left."""
        self._hook.remove()
        if self._rows:
            rows, self._rows = self._rows, []
            self._judge(rows)

    def _judge(self, rows: list[GuardedRow]) -> None:
        # earlier batches may have moved weights
        moment = "before a weight moves" if self._seen == 1 else f"at batch {self._seen} of its stream"
        with undisturbed(None, self._run.args.device):
            self._guard._judge(self._run, lambda: rows, time.perf_counter(), moment)


def rows_of(batch: ModelBatch, number: int, dataset: Any) -> list[GuardedRow]:
    """Return the rows of a batch, each with its place: in the dataset if it is known, else in the batch.

    Args:
        batch: The batch.
        number: Its number, from 0.
        dataset: As for `with_messages`.
    """
    records = with_messages(batch.records(), batch, dataset)
    is_whole = len(records) == len(batch.indices)
    places = [
        f"train_dataset[{batch.indices[row]}]" if is_whole else f"batches[{number}][{row}]"
        for row in range(len(records))
    ]
    has_images = batch.data.get("pixel_values") is not None
    return [GuardedRow(place, record, has_images) for place, record in zip(places, records, strict=True)]


def _processes() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _from_each_process(text: str) -> list[str]:
    """Return a text of each process, in the order of their ranks; every process must call it."""
    if _processes() == 1:
        return [text]
    found: list[Any] = [""] * _processes()
    torch.distributed.all_gather_object(found, text)
    return [str(each) for each in found]


def guard(
    trainer: Any,
    *,
    tokenizer: str | Path | None = None,
    batches: int = 8,
    on_finding: OnFinding = "stop",
) -> MistralGuard:
    """Let a trainer judge its first batches, its model and its tokenizer before the first step.

    Call it before `trainer.train()`.

    Args:
        trainer: A `transformers.Trainer`, or a trainer that is made from it, such as TRL's `SFTTrainer`.
        tokenizer: As for `MistralGuard`.
        batches: As for `MistralGuard`.
        on_finding: As for `MistralGuard`.

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
    callback = MistralGuard(tokenizer=tokenizer, batches=batches, on_finding=on_finding)
    callback.use_dataset(getattr(trainer, "train_dataset", None))
    trainer.add_callback(callback)
    return callback
