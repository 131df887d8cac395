"""Stop a run between two optimizer steps, when a signal asks for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from pytest_mistral_lora.errors import Terminated

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

    def __init__(self, request: StopRequest, over_processes: Callable[[int, str], int]) -> None:
        """Make the callback.

        Args:
            request: What the signals of this process have asked for.
            over_processes: Returns the `max` of a number over all processes, the same in each.
        """
        self._request, self._over_processes = request, over_processes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree with the other processes whether this was the last step."""
        number = self._over_processes(self._request.signal, "max")
        if number:
            self._request.signal = number
            control.should_save = control.should_training_stop = True
