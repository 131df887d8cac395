"""Watch the steps of a run: refuse bad gradients, count overflows, log, evaluate, save and stop in time."""

from __future__ import annotations

import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from pytest_mistral_lora.errors import NonFiniteError, Terminated, TrainingError
from pytest_mistral_lora.training.devices import engine

_LOG = logging.getLogger(__name__)
FORMAT = "eval_format/"
"""Prefix of the format rates in the log."""


def gradient_error(step: int) -> NonFiniteError:
    """Return the error for a gradient that holds NaN or infinity."""
    return NonFiniteError(
        f"a gradient is not finite at step {step}",
        next_step="Nothing is saved. Lower training.learning_rate, or use precision: fp32.",
    )


@dataclass(eq=False)
class StopAtNonFinite(TrainerCallback):
    """Refuses an optimizer step whose gradients are not finite: the adapter stays as it was.

    If a gradient scaler skips such a step, `OverflowWatch` decides.

    Attributes:
        trainer: The trainer, which has the norm of each step.
    """

    trainer: Any

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Look at the norm of all gradients, which is not finite if one of them is not.

        Raises:
            NonFiniteError: If a gradient holds NaN or infinity.
            TrainingError: If there is no gradient.
        """
        if engine() == "deepspeed":  # its step is done already: LoraTrainer checks the norm
            return
        if all(parameter.grad is None for parameter in model.parameters()):
            raise TrainingError(f"no tensor has a gradient at step {state.global_step + 1}")
        # the scaler of fp16: accelerate puts it around the optimizer
        scaler = getattr(optimizer, "scaler", None)
        if scaler is None and not math.isfinite(self.trainer.gradient_norm):
            raise gradient_error(state.global_step + 1)


@dataclass(eq=False)
class OverflowWatch(TrainerCallback):
    """Records each step that a gradient scaler skips because fp16 overflowed, and stops the run after too many.

    A record is a line of the Trainer's log, with `step` and the `loss_scale` that was too large.

    Attributes:
        most: Number of skipped steps, one after another, that stops the run.
    """

    most: int

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Find out whether the step was skipped.

        Raises:
            TrainingError: If it was skipped, and so were as many before it as the recipe allows.
        """
        scaler = getattr(optimizer, "scaler", None)
        if scaler is None or not optimizer.step_was_skipped:
            return
        step = state.global_step + 1
        # the scaler has lowered it since; read in such a step alone, because each reading waits for the GPU
        scale = scaler.get_scale() / scaler.get_backoff_factor()
        # in the log, because checkpoints keep it: a resumed run counts on
        state.log_history.append({"step": step, "loss_scale": scale})
        _LOG.warning("step %d overflowed in fp16 and was skipped; the loss scale was %g", step, scale)
        skipped = set(skipped_steps(state.log_history))
        if skipped.issuperset(range(step - self.most + 1, step + 1)):
            raise TrainingError(
                f"{self.most} steps one after another overflowed in fp16, the last is step {step}",
                next_step="Nothing is saved. Use precision: bf16 or fp32, or lower training.learning_rate.",
            )


def skipped_steps(log: Sequence[Any]) -> list[int]:
    """Return the optimizer steps that a Trainer's log shows as skipped because fp16 overflowed."""
    return [line["step"] for line in log if "loss_scale" in line]


@dataclass(eq=False)
class MeasureLastStep(TrainerCallback):
    """Asks for the losses of the last step inside the loop, because loggers are closed after it.

    Attributes:
        has_held_out: Whether there are rows for a held-out loss.
    """

    has_held_out: bool

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a line of the log, and an evaluation, if this is the last step."""
        if control.should_training_stop:
            # regardless of logging_steps: readers look for the last loss
            control.should_log, control.should_evaluate = True, self.has_held_out


@dataclass(eq=False)
class RunningLoss(TrainerCallback, ExportableState):
    """The mean loss since the last line of the log, in nats a token.

    Checkpoints keep it, so that a resumed run logs the same numbers as an uninterrupted one.
    """

    _sum: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)

    def add(self, loss: float) -> None:
        """Add the loss of a step."""
        self._sum += loss
        self._steps += 1

    def take(self) -> float:
        """Return the mean over the steps, and begin again."""
        mean = self._sum / self._steps
        self._sum, self._steps = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        """Return the data that transformers writes into a checkpoint's `trainer_state.json`."""
        return {"args": {}, "attributes": {"sum": self._sum, "steps": self._steps}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continue the sum of the checkpoint, or start at zero."""
        # Trainer restores callbacks only if told to, and then replaces them by new objects
        kept = state.stateful_callbacks[type(self).__name__]["attributes"] if state.global_step else {}
        self._sum, self._steps = kept.get("sum", 0.0), kept.get("steps", 0)


@dataclass(eq=False)
class SaveByTime(TrainerCallback):
    """Asks for a checkpoint when the last one is some minutes old, by the clock of the main process.

    Attributes:
        minutes: Minutes from one checkpoint to the next.
        reduce_over_processes: Returns the `max` of a number over all processes, the same in each.
        clock: Returns seconds.
    """

    minutes: float
    reduce_over_processes: Callable[[int, str], int]
    clock: Callable[[], float] = field(default=time.monotonic, kw_only=True)
    _last: float = field(default=0.0, init=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint in all processes at the same step."""
        # saving is collective: clocks that differ by a step would leave processes waiting for one another
        due = state.is_world_process_zero and self.clock() - self._last >= 60 * self.minutes
        if self.reduce_over_processes(int(due), "max"):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock again, also after a checkpoint that something else asked for."""
        self._last = self.clock()


@dataclass(eq=False)
class StopRequest:
    """A signal's request to stop the run.

    Attributes:
        signal: Number of the signal that asked the run to stop after its step; 0 until one does.
    """

    signal: int = field(default=0, init=False)
    _waits: bool = field(default=False, init=False)

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Within the block, let the first signal wait for the end of a step; outside it, a signal stops immediately."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def receive(self, number: int, frame: object = None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: If it must not wait: outside the loop, or on the second signal.
        """
        name = signal.Signals(number).name
        if not self._waits or self.signal:
            step = (
                "a second signal, in the middle of a step" if self._waits else "before the first step or after the last"
            )
            kind = Terminated if number == signal.SIGTERM else KeyboardInterrupt
            raise kind(f"stopped by {name}: {step}. Go on from the last checkpoint, if there is one, with --resume.")
        self.signal = number
        notice = f"\n{name}: the run stops after this step, with a checkpoint; a second signal stops it at once\n"
        # not through sys.stderr: a handler may have interrupted a write to it, which must not be entered again
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, notice.encode())


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Let SIGINT (Ctrl-C) and SIGTERM ask for a stop within the block; then restore their handlers.

    Handlers are installed in the main thread only. A signal that this process ignores stays ignored.
    """
    request = StopRequest()
    # Python delivers signals to the main thread only, and refuses handlers elsewhere
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # a shell starts its background jobs with SIGINT ignored: a handler would undo that
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(eq=False)
class StopAtRequest(TrainerCallback):
    """Saves a checkpoint and stops all processes after the same step, once any of them got a signal.

    Attributes:
        request: The request of this process's signals.
        reduce_over_processes: Returns the `max` of a number over all processes, the same in each.
    """

    request: StopRequest
    reduce_over_processes: Callable[[int, str], int]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree with the other processes whether this was the last step."""
        number = self.reduce_over_processes(self.request.signal, "max")
        if number:
            self.request.signal = number
            control.should_save = control.should_training_stop = True
