"""The folder that a run or a merge makes: one writer at a time, and errors of the disk with the next step."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from pytest_mistral_lora.errors import DiskError, InputError
from pytest_mistral_lora.records.files import remove_temporaries
from pytest_mistral_lora.training.devices import is_main

_PAGE = 4096
"""Bytes of the smallest write for which a file system has to find room."""


@contextmanager
def sole_writer(output: Path) -> Iterator[None]:
    """Hold the lock of an output folder, so that two runs or merges never write it at the same time.

    Temporary folders that a killed run or merge has left beside it are removed.

    The operating system releases the lock when the process ends, however it ends. The main process of a distributed run
    holds the lock for all processes.

    Raises:
        InputError: If another process holds the lock, or nothing can be written beside the output.
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
        # while we hold the lock: afterwards another process may have it
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
            raise  # transformers raises OSError for a model that it cannot load
        raise disk_error(output, error, next_step) from error


def ensure_writable_folder(folder: Path) -> None:
    """Create a folder if it is missing, and refuse one in which nothing can be written.

    Raises:
        InputError: If the file system refuses to create the folder or to write in it.
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
