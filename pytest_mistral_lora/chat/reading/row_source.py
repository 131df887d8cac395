"""Where records come from: a file, a folder, or a value of Python. Each record has its place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from pytest_mistral_lora.places import Place


class SourceRecord(NamedTuple):
    """A record of a source.

    Attributes:
        place: Its place.
        value: The record as plain data, or the `RowError` that makes it unreadable.
        is_padded: Whether absent keys are null, as in a table of Arrow.
    """

    place: Place
    value: Any
    is_padded: bool = False


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
