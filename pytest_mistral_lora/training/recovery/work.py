"""The folder of a run that is not finished: whose it is, where it goes on, and what a killed process left there."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pytest_mistral_lora.errors import DiskError, InputError
from pytest_mistral_lora.records.files import read_json, remove_temporaries, write_json
from pytest_mistral_lora.training.devices import is_main
from pytest_mistral_lora.training.recovery.bad_rows import BAD_ROWS
from pytest_mistral_lora.training.recovery.checkpoints import checkpoints, fault_of, is_listed, step_of
from pytest_mistral_lora.training.recovery.failure import FAILURE, is_out_of_memory

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
