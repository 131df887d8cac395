"""The one pass over a dataset: streamed, in several processes where it pays, in bounded memory."""

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
from typing import TextIO

from pytest_mistral_lora.chat.jsonl import scan_lines
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.rows import Chunk, Judge, Plan
from pytest_mistral_lora.conformance.dataset.tally import Tally
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import InputError, MistralLoraError

CHUNK_LINES = 256
CHUNK_BYTES = 1024 * 1024
MANY_BYTES = 4 * 1024 * 1024
"""From here on the pass takes seconds: more than it takes to start processes, and enough for a progress bar."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of a recipe.

    Attributes:
        path: Where it is.
        held: Whether its rows are held out.
    """

    path: Path
    held: bool


def scan(
    plan: Plan,
    files: Sequence[DataFile],
    *,
    tokenizer: CheckpointTokenizer | None = None,
    processes: int | None = None,
    progress: TextIO | None = None,
) -> Tally:
    """Read every row of some files once and return what there is to know of them.

    Args:
        plan: How the rows are judged.
        files: The files, in order.
        tokenizer: The plan's tokenizer, where it is loaded already.
        processes: How many processes judge rows; None for one where there is little to do, else one for each CPU.
        progress: Where a progress bar is drawn if it is a terminal and the pass takes long; None for nowhere.

    Raises:
        MistralLoraError: If a process that judges rows dies.
    """
    size = sum(map(_size, files))
    if processes is None:
        processes = cpus() if is_long(files) else 1
    tally = Tally()
    with _bar(progress, size) as advance:
        chunks = _chunks(files, tally)
        for chunk_tally, read in _in_order(plan, chunks, tokenizer, processes):
            tally.extend(chunk_tally)
            advance(read)
    return tally


def is_long(files: Sequence[DataFile]) -> bool:
    """Return whether a pass over some files takes longer than preparing for it."""
    return sum(map(_size, files)) >= MANY_BYTES


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(file: DataFile) -> int:
    try:
        return file.path.stat().st_size
    except OSError:
        return 0


def _chunks(files: Sequence[DataFile], tally: Tally) -> Iterator[Chunk]:
    """Yield the lines of the files in chunks; what is wrong with a file goes to the tally."""
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
            tally.findings.add(Finding("ML602", error.found, error.place, error.expected))


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


def _in_order(
    plan: Plan, chunks: Iterable[Chunk], tokenizer: CheckpointTokenizer | None, processes: int
) -> Iterator[tuple[Tally, int]]:
    """Yield the tally of each chunk in order, with the number of bytes that it was made of."""
    if processes <= 1:
        judge = Judge(plan, tokenizer)
        for chunk in chunks:
            yield judge.chunk(chunk), _bytes(chunk)
        return
    try:
        yield from _in_pool(plan, chunks, processes)
    except BrokenProcessPool as error:
        raise MistralLoraError(
            "a process that judges rows ended early: out of memory, killed, or started from a script without a guard",
            next_step='Start the check below `if __name__ == "__main__":`, or give processes=1.',
        ) from error


def _in_pool(plan: Plan, chunks: Iterable[Chunk], processes: int) -> Iterator[tuple[Tally, int]]:
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (plan,))
    waiting: deque[tuple[Future[Tally], int]] = deque()
    try:
        for chunk in chunks:
            waiting.append((pool.submit(_judge_chunk, chunk), _bytes(chunk)))
            # chunks in flight are bounded, so memory does not grow with the files
            if len(waiting) > 2 * processes:
                future, read = waiting.popleft()
                yield future.result(), read
        for future, read in waiting:
            yield future.result(), read
    finally:
        pool.shutdown(cancel_futures=True)


def _bytes(chunk: Chunk) -> int:
    return sum(len(line or b"") for _, line in chunk.lines)


_judge: Judge | None = None


def _start(plan: Plan) -> None:
    """Prepare a process of the pool."""
    import signal
    import warnings

    global _judge
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends its pool
    warnings.simplefilter("ignore")
    _judge = Judge(plan)


def _judge_chunk(chunk: Chunk) -> Tally:
    if _judge is None:
        raise RuntimeError("the process was not prepared")
    return _judge.chunk(chunk)


@contextmanager
def _bar(stream: TextIO | None, size: int) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar on a terminal, for a pass that takes long."""
    if stream is None or size < MANY_BYTES or not stream.isatty():
        yield lambda read: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("Judging rows"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(file=stream), transient=True) as bar:
        task = bar.add_task("", total=size)
        yield lambda read: bar.advance(task, read)
