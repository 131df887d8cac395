"""The lines of data files in chunks: what one process reads at a time, in memory that does not grow with the files."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_mistral_lora.chat.jsonl import scan_lines
from pytest_mistral_lora.errors import InputError

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
