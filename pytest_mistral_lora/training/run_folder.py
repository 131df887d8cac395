"""The folders of a run: one writer at a time, checkpoints, what a run before has left, and errors of the disk."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import (
    DiskError,
    InputError,
    MistralLoraError,
    NonFiniteError,
    RowsError,
    exit_code_of,
    interruption,
    is_out_of_memory,
)
from pytest_mistral_lora.records.files import listing, remove_temporaries, write_json
from pytest_mistral_lora.training.devices import is_main

_PAGE = 4096
"""Bytes of the smallest write for which a file system has to find room."""


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Hold the lock of an output folder, so that two runs or merges never write it at the same time.

    Temporary folders that a killed one has left beside it are removed.

    The operating system releases the lock of a process that ends, however it ends. The main process of a distributed
    run holds it for all.

    Raises:
        InputError: If another process holds it, or nothing can be written beside the output.
    """
    if not is_main():
        yield
        return
    ensure_writable_folder(output.parent)
    lock = FileLock(output.with_name(f".{output.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            "another process writes it at this moment",
            place=str(output),
            next_step="Wait for its end, or name another output.",
        ) from error
    except (OSError, NotImplementedError) as error:  # a network file system may have no locks
        sys.stderr.write(f"warning: {lock.lock_file} cannot be locked, so nothing keeps others out: {error}\n")
    try:
        remove_temporaries(output)
        yield
    finally:
        # while it is still held: afterwards it may be another process's
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


_MAKE_ROOM = "Make room, then go on from the last checkpoint with --resume."


def disk_error(file: Path, error: BaseException, next_step: str = _MAKE_ROOM) -> DiskError:
    """Return an error with the file that could not be written, the free space there, and the next step."""
    reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    free = shutil.disk_usage(next(folder for folder in file.parents if folder.exists())).free
    return DiskError(
        f"cannot be written: {reason}; {free / 1e6:,.1f} MB are free there",
        place=str(file),
        next_step=next_step,
    )


@contextmanager
def explain_disk_errors(output: Path, next_step: str = _MAKE_ROOM) -> Iterator[None]:
    """Turn an error of the file system within the block into one that names the output and the next step.

    Raises:
        DiskError: If the block ends in such an error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # transformers raises OSError for a model that it does not load
        raise disk_error(output, error, next_step) from error


def ensure_writable_folder(folder: Path) -> None:
    """Create a folder if it is missing, and refuse one in which nothing can be written.

    Raises:
        InputError: If the file system refuses either.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # permissions do not show a full disk, a quota or a read-only mount: try
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PAGE))
    except OSError as error:
        raise InputError(
            f"cannot be written: {error.strerror}",
            place=str(folder),
            expected="a folder where this process may write",
            next_step="Change its permissions, make room, or name another output.",
        ) from error


LIST = "files.json"
"""The list of a complete checkpoint's files, with size and SHA-256 of each."""


def step_of(checkpoint: Path) -> int:
    """Return the optimizer step of `checkpoint-STEP`."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints(work: Path) -> list[Path]:
    """Return every checkpoint of a work folder, complete or not, the oldest first."""
    found = (path for path in work.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    return sorted(found, key=step_of)


def is_complete(checkpoint: Path) -> bool:
    """Report whether a checkpoint was written to its end; later damage is not looked for."""
    return (checkpoint / LIST).is_file()


def fault_of(checkpoint: Path) -> str:
    """Return the first fault of a checkpoint, such as a file that is not as it was written; empty if there is none."""
    if not is_complete(checkpoint):
        return "it was not written to its end"
    try:
        expected, found = read_json(checkpoint / LIST), listing(checkpoint)
    except (InputError, OSError) as error:
        return str(error)
    return next((f"{name} is not as it was written" for name in expected if found.get(name) != expected[name]), "")


class OtherRunError(InputError):
    """A work folder of another run, or of one that was not asked to resume: it is left as it is."""


class RunFolder:
    """The folders of a run: its output, and beside it `OUTPUT.work` with what an unfinished run leaves.

    Attributes:
        output: The finished adapter's folder.
        work: Checkpoints, and `failure.json` if the run fails; a finished run removes it.
        logs: Files of the loggers; they stay.
        failure: The reason of a failure, as `describe_failure` has it.
        bad_rows: The rows of a step whose loss or gradient is not finite, rendered.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.work = output.with_name(f"{output.name}.work")
        self.logs = output.with_name(f"{output.name}.logs")
        self.failure = self.work / "failure.json"
        self.bad_rows = self.work / "bad_rows.jsonl"
        self._identity = self.work / "run.json"

    def open(self, *, resume: bool) -> None:
        """Check whether a run may start or resume, and create the folder; its content is left as it is.

        Raises:
            InputError: If the output exists, if nothing can be written, or if there is an unfinished run and `resume`
                is false.
        """
        ensure_writable_folder(self.output.parent)
        if self.output.exists():
            raise InputError("exists already", place=str(self.output), next_step="Remove it or name another output.")
        unfinished = [path for path in checkpoints(self.work) if is_complete(path)]
        if unfinished and not resume:
            raise OtherRunError(
                f"an unfinished run is there, at step {step_of(unfinished[-1])}",
                place=str(self.work),
                next_step="Go on from it with --resume, or remove the folder.",
            )
        ensure_writable_folder(self.work)

    def claim(self, identity: str) -> Path | None:
        """Make the folder this run's, remove remains of a killed process, and return the newest sound checkpoint.

        Args:
            identity: Hash of everything that decides the steps of the run.

        Returns:
            The checkpoint to resume from; None if there is none.

        Raises:
            OtherRunError: If there are checkpoints of another run.
        """
        if any(map(is_complete, checkpoints(self.work))) and read_json(self._identity) != {"identity": identity}:
            raise OtherRunError(
                "the unfinished run there was of another recipe, data or number of devices",
                place=str(self.work),
                next_step="Restore them, or remove the folder.",
            )
        checkpoint = None
        for found in reversed(checkpoints(self.work)):
            if not (fault := fault_of(found)):
                checkpoint = found
                break
            if is_main():
                sys.stderr.write(f"warning: {found} is removed: {fault}\n")
                shutil.rmtree(found, ignore_errors=True)
        if is_main():
            for remains in (*self.work.glob(".*"), self.failure, self.bad_rows):
                remains.unlink(missing_ok=True)
            write_json(self._identity, {"identity": identity})
        return checkpoint

    @contextmanager
    def wrap_disk_errors(self) -> Iterator[None]:
        """Explain an error of the block if a checkpoint could not be written, and remove the incomplete checkpoint.

        Raises:
            DiskError: If the block ends in an error while a checkpoint was being written.
        """
        try:
            yield
        # torch.save raises a plain RuntimeError if a write fails
        except (OSError, RuntimeError, SafetensorError) as error:
            incomplete = next((path for path in checkpoints(self.work) if not is_complete(path)), None)
            if incomplete is None or is_out_of_memory(error) or interruption(error):
                raise
            # the file that was written last is the one that failed
            file = max(incomplete.iterdir(), key=lambda path: path.stat().st_mtime, default=incomplete)
            # measured before the removal, which makes room
            failed = disk_error(file, error)
            if is_main():
                shutil.rmtree(incomplete, ignore_errors=True)
            raise failed from error

    def write_failure(self, error: BaseException) -> None:
        """Write `failure.json`; if that fails, too, warn, so that `error` is still reported.

        A launcher may not pass the exit code on: the file remains.
        """
        # the error of the process that ended first is the cause: the others only lost their connection to it
        if _lost_another_process(error) and self.failure.exists():
            return
        try:
            self.work.mkdir(parents=True, exist_ok=True)
            write_json(self.failure, describe_failure(error))
        except OSError as refused:
            sys.stderr.write(f"warning: {self.failure} cannot be written: {refused.strerror}\n")


def _lost_another_process(error: BaseException) -> bool:
    # torch has no type for it, and a sentence for each backend and each phase
    gone = ("Connection closed by peer", "Connection reset by peer", "DistBackendError", "DistNetworkError")
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError) and any(words in text for words in gone)


def describe_failure(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data: `error`, `cause`, `rows` (places of bad rows), `advice`, `exit_code`."""
    error = interruption(error) or error
    advice = error.next_step if isinstance(error, MistralLoraError) else ""
    if isinstance(error, KeyboardInterrupt):
        advice = "Go on with --resume: from the last checkpoint, or from the start if there is none."
    if is_out_of_memory(error):
        advice = "Lower training.micro_batch_tokens, set activation_checkpointing: true, or use precision: bf16."
    if _lost_another_process(error):
        advice = "Another process of this run ended first: read its message, or the system's log. Then use --resume."
    rows: list[str] = []
    if isinstance(error, RowsError):
        rows = [row_error.place for row_error in error.errors]
    elif isinstance(error, NonFiniteError):
        rows = list(error.places)
    return {
        "error": type(error).__name__,
        "cause": str(error) or type(error).__name__,
        "rows": rows,
        "advice": advice,
        "exit_code": exit_code_of(error),
    }
