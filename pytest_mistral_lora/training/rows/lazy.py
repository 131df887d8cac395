"""The rows of a table as sequences: each is made when it is asked for, so their number does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, overload

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, read_row
from pytest_mistral_lora.records.figures import Figures
from pytest_mistral_lora.training.rows.table import RowTable

T = TypeVar("T")


class _Lazy(Sequence[T]):
    """A sequence whose items are made when they are asked for; a slice of it is a tuple."""

    def __init__(self, table: RowTable) -> None:
        self.table = table

    def __len__(self) -> int:
        return len(self.table)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...
    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        positions = range(len(self))[index]
        return self._at(positions) if isinstance(positions, int) else tuple(map(self._at, positions))

    def _at(self, index: int) -> T:
        raise NotImplementedError


class EncodedRows(_Lazy[EncodedRow]):
    """The encodings of a table.

    Attributes:
        figures: What is known of them all.
    """

    def __init__(self, table: RowTable, figures: Figures) -> None:
        """Take a table, and what is known of its rows."""
        super().__init__(table)
        self.figures = figures

    def _at(self, index: int) -> EncodedRow:
        return self.table.encoded(index)


class SourceRows(_Lazy[Row]):
    """The rows of a table, read from its lines again."""

    def __init__(self, table: RowTable, paths: Sequence[Path]) -> None:
        """Take a table, and the data files that its rows came from."""
        super().__init__(table)
        self._paths = tuple(paths)

    def _at(self, index: int) -> Row:
        file, number, line = self.table.line(index)
        row = read_row(self._paths[file], number, line)
        if not isinstance(row, Row):
            raise row or ValueError(f"line {number} of {self._paths[file]} has no row")
        return row
