"""The lines of data files in chunks: what one process reads at a time, in memory that does not grow with the files."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pytest_mistral_lora.chat.reading.jsonl import scan_lines
from pytest_mistral_lora.errors import InputError, MistralLoraError

CHUNK_LINES = 256
CHUNK_BYTES = 1024 * 1024
MANY_BYTES = 4 * 1024 * 1024
"""From here on a pass takes seconds: more than it takes to start processes, and enough for a progress bar."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a recipe.

    Attributes:
        path: Where it is.
        held: Whether all its rows are held out.
    """

    path: Path
    held: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some lines of one file.

    Attributes:
        path: The file.
        file: Its index among the files that are read.
        held: Whether all its rows are held out.
        lines: Line numbers and bytes; None for a line that is too long to read.
    """

    path: Path
    file: int
    held: bool
    lines: Sequence[tuple[int, bytes | None]]

    @property
    def size(self) -> int:
        """Number of bytes that were read."""
        return sum(len(line or b"") for _, line in self.lines)


def total_bytes(files: Sequence[DataFile]) -> int:
    """Return the size of some files; one that is not there counts 0."""
    return sum(_size(file.path) for file in files)


def is_long(files: Sequence[DataFile]) -> bool:
    """Return whether a pass over some files takes longer than preparing for it."""
    return total_bytes(files) >= MANY_BYTES


def chunks(files: Sequence[DataFile], refuse: Callable[[InputError], None]) -> Iterator[Chunk]:
    """Yield the lines of some files in order.

    Args:
        files: The files.
        refuse: Gets what is wrong with a file: it cannot be read, has no rows, or changed while it was read.
    """
    for index, file in enumerate(files):
        try:
            before = _state(file.path)
            found = False
            for chunk in _chunks_of(file, index):
                found = found or any(line is None or line.strip() for _, line in chunk.lines)
                yield chunk
            if not found:
                raise InputError("the file has no rows", place=str(file.path))
            if _state(file.path) != before:
                raise InputError("the file changed while it was read", place=str(file.path))
        except InputError as error:
            refuse(error)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _state(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file does.

    Raises:
        InputError: If it is not a regular file: what cannot be read twice cannot be checked and then trained on.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", place=str(path)) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise InputError(f"is {kind}", place=str(path), expected="a JSONL file")
    return status.st_ino, status.st_size, status.st_mtime_ns


def _chunks_of(file: DataFile, index: int) -> Iterator[Chunk]:
    lines: list[tuple[int, bytes | None]] = []
    size = 0
    for number, line in scan_lines(file.path):
        lines.append((number, line))
        size += len(line or b"")
        if len(lines) >= CHUNK_LINES or size >= CHUNK_BYTES:
            yield Chunk(file.path, index, file.held, lines)
            lines, size = [], 0
    if lines:
        yield Chunk(file.path, index, file.held, lines)


Plan = TypeVar("Plan")
Result = TypeVar("Result")


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    prepare: Callable[[Plan], Callable[[Chunk], Result]], plan: Plan, chunks: Iterable[Chunk], processes: int
) -> Iterator[tuple[Result, int]]:
    """Yield what comes of each chunk, in order, with the number of bytes that were read for it.

    Args:
        prepare: Makes the work of a plan, once in each process; with several processes, plan and `prepare` must be
            picklable.
        plan: What the work has to know.
        chunks: The chunks; only a few are in flight, so memory does not grow with their number.
        processes: How many processes work; one is this one.

    Raises:
        MistralLoraError: If a process dies.
    """
    if processes <= 1:
        work = prepare(plan)
        for chunk in chunks:
            yield work(chunk), chunk.size
        return
    try:
        yield from _in_pool(prepare, plan, chunks, processes)
    except BrokenProcessPool as error:
        raise MistralLoraError(
            "a process that reads rows ended early: out of memory, killed, or started from a script without a guard",
            next_step='Start the work below `if __name__ == "__main__":`, or give processes=1.',
        ) from error


def _in_pool(
    prepare: Callable[[Plan], Callable[[Chunk], Result]], plan: Plan, chunks: Iterable[Chunk], processes: int
) -> Iterator[tuple[Result, int]]:
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (prepare, plan))
    waiting: deque[tuple[Future[Result], int]] = deque()
    try:
        for chunk in chunks:
            waiting.append((pool.submit(_do, chunk), chunk.size))
            if len(waiting) > 2 * processes:
                future, read = waiting.popleft()
                yield future.result(), read
        while waiting:
            future, read = waiting.popleft()
            yield future.result(), read
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Chunk], Any] | None = None


def _start(prepare: Callable[[Any], Callable[[Chunk], Any]], plan: Any) -> None:
    """Prepare a process of the pool."""
    import signal
    import threading
    import warnings

    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends its pool
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    _work = prepare(plan)


def _end_with_parent() -> None:
    """End this process when the parent is killed: the pool itself would wait for work for ever."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(chunk: Chunk) -> Any:
    if _work is None:
        raise RuntimeError("the process was not prepared")
    return _work(chunk)


@contextmanager
def bar(stream: TextIO | None, size: int, title: str) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar in bytes on a terminal, for a pass that takes long; nothing elsewhere."""
    if stream is None or size < MANY_BYTES or not stream.isatty():
        yield lambda read: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as shown:
        task = shown.add_task("", total=size)
        yield lambda read: shown.advance(task, read)
