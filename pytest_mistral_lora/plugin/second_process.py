"""A copy of this process that makes the tiny train, and then judges checks from the last one backwards.

A machine has two cores or more, and the suite is one process. The copy is forked, so that the libraries are imported
once, and a `conftest.py` that has changed something has changed it there, too.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.sharedctypes import RawArray
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_mistral_lora.conformance.checks import Check
    from pytest_mistral_lora.conformance.finding import Result


# A library that is forked at a bad moment can wait for a thread that only the first process has; no check takes as long
PATIENCE = 600.0
"""Seconds after which the second process is taken for hung, and ended: its checks are judged in the first."""


class SecondProcess:
    """Judges the last of some checks while this process judges the first, until they meet.

    Args:
        checks: The checks of the session in their order, those of the tiny train last.
        work_folder: The folder of the session.
        device: The device of the tiny train.
    """

    def __init__(self, checks: Sequence[Check], work_folder: Path, device: str) -> None:
        self._trains = next(check for check in checks if check.subject == "train")
        self._work_folder, self._device = work_folder, device
        self._checks = [check for check in checks if check.subject != "train"]
        self._places = {check.name: place for place, check in enumerate(self._checks)}
        # The number of checks that were begun here, the place of the last one that was begun there, and whether the
        # tiny train was made there. Each process writes its own: where they meet, a check may be judged twice, and
        # never by nobody.
        self._bounds = RawArray("i", [0, len(self._checks), 0])
        self._results: dict[int, tuple[Result | None, float]] = {}
        context = multiprocessing.get_context("fork")
        self._connection, self._other_end = context.Pipe(duplex=False)
        self._parent = os.getpid()
        self._process = context.Process(target=self._serve)
        self._process.start()
        self._other_end.close()

    @staticmethod
    def is_possible() -> bool:
        """Whether this process can be forked: nothing but this thread runs in it, and CUDA is not used."""
        if threading.active_count() > 1:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' warnings are not about the user's code
            try:
                from pytest_mistral_lora.conformance.train.saved_adapter import ForkedProcess

                if not ForkedProcess.is_possible():
                    return False
                # in both processes, and once: it is most of what either imports
                import_module("transformers.models.auto.tokenization_auto")
            except ImportError:
                return False
        return True

    def result_of(self, check: Check) -> tuple[Result, float] | None:
        """Return the result of a check and its seconds; None if it is to be judged here."""
        place = self._places.get(check.name)
        if place is None:
            # a check of the train waits for a lock that the other process holds
            deadline = time.monotonic() + PATIENCE
            while not self._bounds[2] and self._process.is_alive() and time.monotonic() < deadline:
                time.sleep(0.02)
            if not self._bounds[2]:
                self._process.kill()
                self._process.join()  # the lock is free when it has ended
            return None
        if place < self._bounds[1]:
            self._bounds[0] = max(self._bounds[0], place + 1)
            return None
        while place not in self._results:
            if not self._connection.poll(PATIENCE):
                self._process.kill()
            try:
                number, *judged = self._connection.recv()
            except (EOFError, OSError):  # it was killed, perhaps in the midst of a result
                return None
            self._results[number] = (judged[0], judged[1])
        result, seconds = self._results[place]
        return None if result is None else (result, seconds)

    def end(self) -> None:
        """End the process."""
        self._process.kill()  # one that is stopped, as by a debugger, takes no other signal
        self._process.join()
        self._connection.close()

    def _serve(self) -> None:
        import torch

        # Ctrl-C is for the first process, which then ends this one
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._connection.close()
        silence = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silence, stream)
        warnings.simplefilter("ignore")
        gc.set_threshold(200_000)  # as `Check.run` does
        # the first process may have used several threads, of which a copy has none: OpenMP would wait for them
        torch.set_num_threads(1)
        self._train()
        self._bounds[2] = 1
        for place in reversed(range(len(self._checks))):
            if place < self._bounds[0] or os.getppid() != self._parent:
                return
            self._bounds[1] = place
            started = time.perf_counter()
            try:
                # not `run`: of a tokenizer that does not load, the first check of the session has the finding
                result = self._checks[place].judge()
            except Exception:  # judged again there
                result = None
            self._other_end.send((place, result, time.perf_counter() - started))

    def _train(self) -> None:
        from pytest_mistral_lora.checkpoint.tiny_model import TinyKind
        from pytest_mistral_lora.conformance.train.tiny_run import attempt

        target = self._trains.target
        try:
            kind = TinyKind.of(target.tokenizer.path)
            attempt(target.oracle, self._work_folder, device=self._device, kind=kind, is_new=True)
        except Exception:  # a check reports it
            return
