"""When a run saves a checkpoint, and how it is known to be whole: a list of its files is written last."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import listing, read_json, write_json

LIST = "files.json"
"""The list of a whole checkpoint's files, with size and SHA-256 of each."""

_KEPT = 2
"""The newest, and one to fall back to."""


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of `checkpoint-STEP`."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(work: Path) -> list[Path]:
    """Return every checkpoint of a work folder, whole or not, the oldest first."""
    found = (path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    return sorted(found, key=step_of)


def is_listed(checkpoint: Path) -> bool:
    """Say whether a checkpoint was written to its end; what became of it since is not looked at."""
    return (checkpoint / LIST).is_file()


def fault_of(checkpoint: Path) -> str:
    """Return what is wrong with a checkpoint: the first file that is not as it was written, or nothing."""
    if not is_listed(checkpoint):
        return "it was not written to its end"
    try:
        expected, found = read_json(checkpoint / LIST), listing(checkpoint)
    except (InputError, OSError) as error:
        return str(error)
    return next((f"{name} is not as it was written" for name in expected if found.get(name) != expected[name]), "")


class KeepWhole(TrainerCallback):  # type: ignore[misc]
    """List the files of each checkpoint once all processes have written theirs; only then remove an older one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written."""
        PartialState().wait_for_everyone()
        if state.is_world_process_zero:
            work = Path(args.output_dir)
            checkpoint = work / f"checkpoint-{state.global_step}"
            write_json(checkpoint / LIST, listing(checkpoint))
            for old in [one for one in checkpoints(work) if is_listed(one)][:-_KEPT]:
                shutil.rmtree(old, ignore_errors=True)


class SaveByTime(TrainerCallback):  # type: ignore[misc]
    """Ask for a checkpoint when the last one is some minutes old, by the clock of the main process."""

    def __init__(
        self,
        minutes: float,
        over_processes: Callable[[int, str], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the callback.

        Args:
            minutes: Minutes from one checkpoint to the next.
            over_processes: Returns the `max` of a number over all processes, the same in each.
            clock: Returns seconds.
        """
        self._seconds, self._over_processes, self._clock = 60 * minutes, over_processes, clock
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._last = self._clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint, in every process or in none."""
        due = state.is_world_process_zero and self._clock() - self._last >= self._seconds
        if self._over_processes(int(due), "max"):
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock again, whatever asked for this checkpoint."""
        self._last = self._clock()
