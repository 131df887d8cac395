"""Read data files in chunks of lines, in one process or in several, in memory that does not grow with the files."""

from __future__ import annotations

import os
import stat
from codecs import BOM_UTF8
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TextIO, TypeVar

from pytest_mistral_lora.chat.chunks.registry import register_types, type_names
from pytest_mistral_lora.chat.kinds.registry import kind_names, register_kinds
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.reading.files import scan_lines
from pytest_mistral_lora.errors import InputError, MistralLoraError, RowError
from pytest_mistral_lora.escaping import UNMIXED, own_stream
from pytest_mistral_lora.places import NamedSource, Place

CHUNK_LINES = 256
CHUNK_BYTES = 1024 * 1024
_AHEAD = 64
_MOST_PROCESSES = 61
"""The most processes of a machine with fewer CPUs, whatever a user asks for; Windows waits for no more."""
MANY_BYTES = 4 * 1024 * 1024
"""A pass over more bytes takes seconds: longer than to start processes, and long enough for a progress bar."""


class LineSource(Protocol):
    """The reader of a file in another format, whose rows come as the lines of a JSONL file."""

    @property
    def bytes_read(self) -> int:
        """Number of bytes of the file that the last pass has read so far."""

    @property
    def place(self) -> Place:
        """The place of the record whose line was yielded last; `NOWHERE` before the first."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """The settings that, with the bytes of the file, decide the rows, as plain JSON data."""

    def facts(self) -> Mapping[str, Any]:
        """Return the settings and results of the last pass, as plain JSON data."""

    def lines(self) -> Iterator[tuple[int, bytes | RowError]]:
        """Read the file from its start, and yield the number of each record in it, and its row or its error.

        Raises:
            InputError: If the file cannot be read.
        """


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of rows, or one that is converted to rows while it is read.

    Attributes:
        path: The file.
        is_held_out: Whether all its rows are held out.
        source: Its reader, if it is converted; None for a JSONL file of rows.
        objective: The declared objective of its rows.
        is_retention: Whether they are held out as rows of other subjects, for a gate alone.
        is_value: Whether the rows are a value of Python, which `path` names, and `source` reads.
    """

    path: Path
    is_held_out: bool = False
    source: LineSource | None = None
    objective: Objective = ANSWERS
    is_retention: bool = False
    is_value: bool = False

    @property
    def place(self) -> Place:
        """The place of the file as a whole."""
        return Place(NamedSource(str(self.path), self.is_value))

    def lines(self) -> Iterator[tuple[int, bytes | int | RowError]]:
        """Yield numbers and lines for `chat.row_files.read_row`; of a converted file, records as lines of rows.

        Raises:
            InputError: If the file cannot be read, or its format is not the declared one.
        """
        return scan_lines(self.path) if self.source is None else self.source.lines()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some lines of one file.

    Attributes:
        source: The place of the file.
        file: Its index among the files that are read.
        is_held_out: Whether all its rows are held out.
        lines: Numbers and bytes of lines; in place of the bytes, the size of a line that is too large, and the
            error of a record that cannot be converted.
        size: Number of bytes of the file that were read for them.
        first_lines: The line where each record begins, by its number, for a file whose records are not lines.
        objective: The declared objective of the rows.
    """

    source: Place
    file: int
    is_held_out: bool
    lines: Sequence[tuple[int, bytes | int | RowError]]
    size: int
    first_lines: Mapping[int, int] = field(default_factory=dict)
    objective: Objective = ANSWERS

    @property
    def path(self) -> Path:
        """The file; of a value of Python, its name."""
        return Path(self.source.source.name)

    def place(self, number: int) -> Place:
        """Return the place of a record by its number."""
        return replace(self.source, record=number, line=self.first_lines.get(number))


def total_bytes(files: Sequence[DataFile]) -> int:
    """Return the size of some files in bytes; a file that cannot be read counts 0, and is reported later."""
    total = 0
    for file in files:
        with suppress(OSError):
            total += 0 if file.is_value else file.path.stat().st_size
    return total


def is_long(files: Sequence[DataFile]) -> bool:
    """Return whether a pass over some files takes longer than starting processes for it."""
    return total_bytes(files) >= MANY_BYTES


def chunks(files: Sequence[DataFile], refuse: Callable[[InputError], None], first: int = 0) -> Iterator[Chunk]:
    """Yield the lines of some files in order.

    Args:
        files: The files.
        refuse: Called with the error of a file that cannot be read, has no rows, or changed while it was read.
        first: Index of the first file among those of the dataset.
    """
    for index, file in enumerate(files, start=first):
        try:
            before = _state(file)
            found = False
            for lines, size, first_lines in _parts(file):
                found = found or any(
                    not isinstance(line, bytes) or line.removeprefix(BOM_UTF8).strip() for _, line in lines
                )
                yield Chunk(file.place, index, file.is_held_out, lines, size, first_lines, file.objective)
            if not found:
                raise InputError("there are no rows" if file.is_value else "the file has no rows", place=file.place)
            if _state(file) != before:
                raise InputError("the file changed while it was read", place=str(file.path))
        except InputError as error:
            refuse(error)


def _parts(file: DataFile) -> Iterator[tuple[list[tuple[int, bytes | int | RowError]], int, dict[int, int]]]:
    """Yield some lines of a file at a time, with the bytes that were read for them, and the line of each record."""
    lines: list[tuple[int, bytes | int | RowError]] = []
    first_lines: dict[int, int] = {}
    size = counted = 0
    for number, line in file.lines():
        lines.append((number, line))
        size += len(line) if isinstance(line, bytes) else 0
        if file.source is not None and file.source.place.line is not None:
            first_lines[number] = file.source.place.line
        if len(lines) >= CHUNK_LINES or size >= CHUNK_BYTES:
            # the size of a compressed file or a table is not that of its rows
            read = size if file.source is None else file.source.bytes_read - counted
            yield lines, read, first_lines
            lines, first_lines, size, counted = [], {}, 0, counted + read
    if lines:
        yield lines, size if file.source is None else file.source.bytes_read - counted, first_lines


def _state(file: DataFile) -> tuple[int, int, int] | None:
    """Return inode, size and modification time: they change if the file does; None for rows that are no file.

    Raises:
        InputError: If it is not a regular file: a pipe cannot be read twice, to be checked and then trained on.
    """
    if file.is_value:
        return None
    try:
        status = file.path.stat()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", place=file.place) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise InputError(f"is {kind}", place=file.place, expected="a JSONL file")
    return status.st_ino, status.st_size, status.st_mtime_ns


class SizedPart(Protocol):
    """A part of the work on a file."""

    @property
    def size(self) -> int:
        """Number of bytes of the file that were read for it."""


PlanT = TypeVar("PlanT")
PartT = TypeVar("PartT", bound=SizedPart)
ResultT = TypeVar("ResultT")


def cpus() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_for(files: Sequence[DataFile]) -> int:
    """Return how many processes read some files: one if they are short, else `$MISTRAL_LORA_PROCESSES`, or the CPUs.

    Raises:
        InputError: If the variable is not a number from 1 on.
    """
    named = os.environ.get("MISTRAL_LORA_PROCESSES", "")
    if named and not (named.isascii() and named.isdigit() and int(named[:9]) > 0):
        raise InputError(f"is {named!r}", place="$MISTRAL_LORA_PROCESSES", expected="a number of processes, from 1 on")
    if not is_long(files):
        return 1
    return int(named[:9]) if named else cpus()


def in_order(
    prepare: Callable[[PlanT], Callable[[PartT], ResultT]],
    plan: PlanT,
    chunks: Iterable[PartT],
    processes: int,
    here: Callable[[PartT], ResultT] | None = None,
) -> Iterator[tuple[ResultT, int]]:
    """Yield the result of each chunk, in order, with the number of bytes that were read for it.

    Args:
        prepare: Makes the work of a plan, once in each process; with several processes, plan and `prepare` must be
            picklable.
        plan: The data that `prepare` needs.
        chunks: The chunks; only a few are in flight, so memory does not grow with their number.
        processes: Number of processes, which is bounded; with 1, this process does the work.
        here: The work, if it is prepared in this process: then this process counts as one of them.

    Raises:
        MistralLoraError: If a process dies.
    """
    processes = min(processes, max(cpus(), _MOST_PROCESSES))
    if processes <= 1:
        work = here or prepare(plan)
        for chunk in chunks:
            yield work(chunk), chunk.size
        return
    try:
        yield from _in_pool(prepare, plan, chunks, processes if here is None else processes - 1, here)
    except BrokenProcessPool as error:
        raise MistralLoraError(
            "a process that reads rows ended early: out of memory, killed, or started from a script without a guard",
            next_step='Start the work below `if __name__ == "__main__":`, or give processes=1.',
        ) from error


def _in_pool(
    prepare: Callable[[PlanT], Callable[[PartT], ResultT]],
    plan: PlanT,
    chunks: Iterable[PartT],
    processes: int,
    here: Callable[[PartT], ResultT] | None,
) -> Iterator[tuple[ResultT, int]]:
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (kind_names(), type_names(), prepare, plan))
    waiting: deque[tuple[Future[ResultT], int]] = deque()
    # Two chunks in flight for each process keep all of them busy; more would only take memory. Results take little:
    # this process goes on with its own chunks while the others start.
    flying, most = 2 * processes, 2 * processes if here is None else 2 * processes + _AHEAD
    try:
        for chunk in chunks:
            if here is None or sum(not future.done() for future, _ in waiting) < flying:
                waiting.append((pool.submit(_do, chunk), chunk.size))
            else:
                done: Future[ResultT] = Future()
                done.set_result(here(chunk))
                waiting.append((done, chunk.size))
            while len(waiting) > most or (here is not None and waiting and waiting[0][0].done()):
                future, read = waiting.popleft()
                yield future.result(), read
        while waiting:
            future, read = waiting.popleft()
            yield future.result(), read
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any] | None = None


def _start(
    kinds: Sequence[str], types: Sequence[str], prepare: Callable[[Any], Callable[[Any], Any]], plan: Any
) -> None:
    """Prepare a process of the pool, which knows the kinds of records and types of chunks that this process knows."""
    import signal
    import threading
    import warnings

    global _work
    # Ctrl-C reaches the whole process group: the parent handles it, and ends its pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    register_kinds(kinds)
    register_types(types)
    _work = prepare(plan)


def _end_with_parent() -> None:
    import multiprocessing

    # A pool's process waits for work on a pipe, and never learns that a parent was killed by SIGKILL.

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _do(chunk: Any) -> Any:
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
    with Progress(*columns, console=Console(file=own_stream(stream)), transient=True, **UNMIXED) as shown:
        task = shown.add_task("", total=size)
        yield lambda read: shown.advance(task, read)
