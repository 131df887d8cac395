"""When a run saves a checkpoint, and how it is known to be whole: a list of its files is written last."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import DiskError, InputError, NonFiniteError, is_out_of_memory
from pytest_mistral_lora.records.files import listing, remove_temporaries, write_json, write_text
from pytest_mistral_lora.training.devices import is_main
from pytest_mistral_lora.training.failure import FAILURE
from pytest_mistral_lora.training.rows.loading import Split
from pytest_mistral_lora.training.save import rendered

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
        reduce_over_processes: Callable[[int, str], int],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the callback.

        Args:
            minutes: Minutes from one checkpoint to the next.
            reduce_over_processes: Returns the `max` of a number over all processes, the same in each.
            clock: Returns seconds.
        """
        self._seconds, self._over_processes, self._clock = 60 * minutes, reduce_over_processes, clock
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


BAD_ROWS = "bad_rows.jsonl"
_NAMED = 20


def with_rows(error: NonFiniteError, rows: Sequence[int], split: Split, file: Path) -> NonFiniteError:
    """Return the error with the rows named.

    Args:
        error: Why the run stopped.
        rows: Places of the rows in `split`.
        split: The training rows.
        file: Where they are rendered.
    """
    places = [split.rows[row].place for row in rows]
    named = ", ".join(places[:_NAMED]) + (f" and {len(places) - _NAMED} more" if len(places) > _NAMED else "")
    return NonFiniteError(
        f"{error.found}; the rows: {named}",
        rows=rows,
        places=places,
        next_step=f"They are rendered in {file}. {error.next_step}",
    )


def write_rows(file: Path, error: NonFiniteError, split: Split, encoder: Encoder) -> None:
    """Write the rows of an error, one a line, each with its place, text, tokens and labels."""
    lines = [
        {"place": split.rows[row].place, **rendered(encoder, split.rows[row], split.encoded[row])} for row in error.rows
    ]
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


_NOTE = "run.json"
_PAGE = 4096
"""Bytes of the smallest write that a file system has to find room for."""


def work_folder_of(output: Path) -> Path:
    """Return the folder for checkpoints and `failure.json`: `OUTPUT.work`, beside the output."""
    return output.with_name(f"{output.name}.work")


class OtherRunError(InputError):
    """A work folder that is another run's, or of one that was not asked to go on: it is left as it is."""


class WorkFolder:
    """`OUTPUT.work`, beside the output.

    Attributes:
        path: The folder.
    """

    def __init__(self, output: Path, *, resume: bool) -> None:
        """Look whether a run may start or go on; what is there already is left as it is.

        Raises:
            InputError: If the output exists, if nothing can be written, or if there is an unfinished run that was not
                asked to go on.
        """
        self.path = work_folder_of(output)
        self._output = output
        require_writable(output.parent)
        if output.exists():
            raise InputError("exists already", place=str(output), next_step="Remove it or name another output.")
        unfinished = [one for one in checkpoints(self.path) if is_listed(one)]
        if unfinished and not resume:
            raise OtherRunError(
                f"an unfinished run is there, at step {step_of(unfinished[-1])}",
                place=str(self.path),
                next_step="Go on from it with --resume, or remove the folder.",
            )
        require_writable(self.path)

    def claim(self, identity: str) -> Path | None:
        """Make the folder this run's, clear what a killed process left, and return the newest whole checkpoint, if any.

        Raises:
            OtherRunError: If there are checkpoints of another run.
        """
        note = self.path / _NOTE
        if any(map(is_listed, checkpoints(self.path))) and read_json(note) != {"identity": identity}:
            raise OtherRunError(
                "the unfinished run there was of another recipe, data or number of devices",
                place=str(self.path),
                next_step="Restore them, or remove the folder.",
            )
        checkpoint = self._newest_whole()
        if is_main():
            remove_temporaries(self._output)
            for file in (*self.path.glob(".*"), self.path / FAILURE, self.path / BAD_ROWS):
                file.unlink(missing_ok=True)
            write_json(note, {"identity": identity})
        return checkpoint

    def _newest_whole(self) -> Path | None:
        for checkpoint in reversed(checkpoints(self.path)):
            fault = fault_of(checkpoint)
            if not fault:
                return checkpoint
            if is_main():
                sys.stderr.write(f"warning: {checkpoint} is removed: {fault}\n")
                shutil.rmtree(checkpoint, ignore_errors=True)
        return None

    @contextmanager
    def explains_failed_writes(self) -> Iterator[None]:
        """Say what to do when a checkpoint cannot be written; its remains are removed, the one before it stays.

        Raises:
            DiskError: If the block ends in an error while a checkpoint was being written.
        """
        try:
            yield
        except (OSError, RuntimeError, SafetensorError) as error:  # torch has no type of its own for a failed write
            part = next((one for one in checkpoints(self.path) if not is_listed(one)), None)
            if part is None or is_out_of_memory(error):
                raise
            file = max(part.iterdir(), key=lambda one: one.stat().st_mtime, default=part)
            failed = disk_error(file, error)
            if is_main():
                shutil.rmtree(part, ignore_errors=True)
            raise failed from error

    @contextmanager
    def explains_failed_output(self) -> Iterator[None]:
        """Say what to do when the finished folder cannot be written.

        Raises:
            DiskError: If the block ends in an error of the file system.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise disk_error(self._output, error) from error


def disk_error(
    file: Path, error: BaseException, next_step: str = "Make room, then go on from the last checkpoint with --resume."
) -> DiskError:
    """Return an error that says what could not be written, how much is free there, and what to do."""
    reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
    free = shutil.disk_usage(next(folder for folder in file.parents if folder.exists())).free
    return DiskError(
        f"cannot be written: {reason}; {free / 1e6:,.1f} MB are free there",
        place=str(file),
        next_step=next_step,
    )


def require_writable(folder: Path) -> None:
    """Make a folder where it is not there, and refuse one where nothing can be written.

    Raises:
        InputError: If the file system refuses either.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PAGE))
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}",
            place=str(folder),
            expected="a folder where this process may write",
            next_step="Change its permissions, make room, or name another output.",
        ) from error
