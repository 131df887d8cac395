"""`failure.json`: why a run left no adapter. A launcher may not pass the exit code on; the file stays."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pytest_mistral_lora.errors import (
    MistralLoraError,
    NonFiniteError,
    RowsError,
    Terminated,
    exit_code_of,
    is_out_of_memory,
)
from pytest_mistral_lora.records.files import write_json

FAILURE = "failure.json"
_GONE = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "DistNetworkError")
_MEMORY_ADVICE = "Lower training.micro_batch_tokens, set activation_checkpointing: true, or use precision: bf16."


def leave_failure(work: Path, error: BaseException) -> None:
    """Write `failure.json` into a run's work folder; where that cannot be done, say so, and let the error be heard.

    A process that only lost another one does not write over what that one has said.
    """
    if _lost_another(error) and (work / FAILURE).exists():
        return
    try:
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / FAILURE, describe(error))
    except OSError as refused:
        sys.stderr.write(f"warning: {work / FAILURE} cannot be written: {refused.strerror}\n")


def _lost_another(error: BaseException) -> bool:
    """Say whether the error is that another process of the run has gone: torch has many sentences for it."""
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError) and any(words in text for words in _GONE)


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data: `cause`, `rows` (places of bad rows), `advice`, `exit_code`."""
    advice = error.next_step if isinstance(error, MistralLoraError) else ""
    if is_out_of_memory(error):
        advice = _MEMORY_ADVICE
    if _lost_another(error):
        advice = "Another process of this run ended first: look for what it, or the system, says. Then use --resume."
    return {
        "error": type(error).__name__,
        "cause": str(error) or type(error).__name__,
        "rows": _rows(error),
        "advice": advice,
        "exit_code": exit_code_of(error),
    }


def _rows(error: BaseException) -> list[str]:
    if isinstance(error, RowsError):
        return [one.place for one in error.errors]
    return list(error.places) if isinstance(error, NonFiniteError) else []


_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """What the signals have asked for.

    Attributes:
        signal: Number of the signal that asked the run to stop after its step; 0 as long as none did.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._waits = False

    @contextmanager
    def after_the_step(self) -> Iterator[None]:
        """Within the block, let the first signal wait for the end of a step; elsewhere a signal stops at once."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    def receive(self, number: int, frame: object = None) -> None:
        """Take a signal, as its handler.

        Raises:
            KeyboardInterrupt: If it must not wait: outside the loop, or when it is the second one.
        """
        if not self._waits or self.signal:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.signal = number
        # a handler may have interrupted a write to sys.stderr, which must not be entered again
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, _notice(number))


def _notice(number: int) -> bytes:
    name = signal.Signals(number).name
    return f"\n{name}: the run stops after this step, with a checkpoint; a second signal stops it at once\n".encode()


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Let SIGINT (Ctrl-C) and SIGTERM ask for a stop within the block; then restore their handlers.

    Python delivers signals to the main thread alone: in another one, nothing is installed. A signal that this process
    was told to ignore stays ignored, as for a job in the background of a shell.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.receive) for number in heard}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopAtRequest(TrainerCallback):  # type: ignore[misc]
    """Save a checkpoint and stop after the step in which a process was asked to; all processes at the same one."""

    def __init__(self, request: StopRequest, reduce_over_processes: Callable[[int, str], int]) -> None:
        """Make the callback.

        Args:
            request: What the signals of this process have asked for.
            reduce_over_processes: Returns the `max` of a number over all processes, the same in each.
        """
        self._request, self._over_processes = request, reduce_over_processes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree with the other processes whether this was the last step."""
        number = self._over_processes(self._request.signal, "max")
        if number:
            self._request.signal = number
            control.should_save = control.should_training_stop = True
