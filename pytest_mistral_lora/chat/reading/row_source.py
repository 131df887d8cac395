"""Where records come from: a file, a folder, or a value of Python. Each record has its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pytest_mistral_lora.chat.reading.files import read_line
from pytest_mistral_lora.places import Place


class UnparsedLine(NamedTuple):
    """A line of a file of JSON Lines, which is not blank.

    Attributes:
        path: The file.
        number: The number of the line, from 1.
        line: Its bytes.
    """

    path: Path
    number: int
    line: bytes

    def parsed(self) -> Any:
        """Return the value of the line, or the `RowError` that makes it unreadable."""
        item = read_line(self.path, self.number, self.line)
        return item[1] if isinstance(item, tuple) else item


class SourceRecord(NamedTuple):
    """A record of a source.

    Attributes:
        place: Its place.
        given: The record as the source has it: a value, or a line that is not parsed yet. Lines are small to send to
            another process, which parses them.
        is_padded: Whether absent keys are null, as in a table of Arrow.
    """

    place: Place
    given: Any
    is_padded: bool = False

    @property
    def value(self) -> Any:
        """The record as plain data, or the `RowError` that makes it unreadable; a line is parsed each time."""
        return self.given.parsed() if isinstance(self.given, UnparsedLine) else self.given


class RowSource(Protocol):
    """Records in order, with their places."""

    @property
    def place(self) -> Place:
        """The place of the source as a whole."""

    @property
    def is_repeatable(self) -> bool:
        """Whether `records` may be called again: not for a generator, which is read once."""

    @property
    def is_sample(self) -> bool:
        """Whether more records follow, as behind the batches of a guard: that a row is missing is then no fault."""

    def records(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[SourceRecord]:
        """Yield the records.

        Args:
            progress: Called with the number of bytes read since the last call.

        Raises:
            InputError: If the source cannot be read.
        """
