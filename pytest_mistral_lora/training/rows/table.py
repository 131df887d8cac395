"""Encoded rows in Arrow, in memory or mapped from a file: read one at a time, whatever their number.

The columns of a row: `input_ids` and `labels` (int32, one a token), `spans` (int32, six a span: turn or -1, role, kind,
start, end, supervised), and where it came from: `line` (the bytes of its line), `number` (of the line) and `file`
(index among the data files).
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from pytest_mistral_lora.chat.encoded import EncodedRow, Span
from pytest_mistral_lora.chat.rows import Row, read_row
from pytest_mistral_lora.records.data_stats import Figures

Ints = npt.NDArray[np.integer[Any]]

_ROLES = (None, "system", "user", "assistant", "tool")
_KINDS: tuple[Any, ...] = ("control", "text", "tool_call", "eos")
_LISTS = ("input_ids", "labels", "spans")
_SPAN_FIELDS = 6
_BATCH_BYTES = 32 * 1024 * 1024


class Columns:
    """Rows on their way into Arrow."""

    def __init__(self) -> None:
        self._values = {name: array("i") for name in _LISTS}
        self._ends = {name: [0] for name in _LISTS}
        self._lines: list[bytes] = []
        self._numbers: list[int] = []

    def add(self, encoded: EncodedRow, number: int, line: bytes) -> None:
        """Add a row, with the number and the bytes of its line."""
        spans = (value for span in encoded.spans for value in _span_values(span))
        for name, values in zip(_LISTS, (encoded.input_ids, encoded.labels or (), spans), strict=True):
            self._values[name].extend(values)
            self._ends[name].append(len(self._values[name]))
        self._lines.append(line)
        self._numbers.append(number)

    def batch(self, file: int) -> Any:
        """Return the rows, all of one data file, as an Arrow record batch."""
        import pyarrow as pa

        columns = {name: self._list(name) for name in _LISTS}
        columns["line"] = pa.array(self._lines, pa.binary())
        columns["number"] = pa.array(self._numbers, pa.int64())
        columns["file"] = pa.array([file] * len(self._lines), pa.int32())
        return pa.record_batch(columns)

    def _list(self, name: str) -> Any:
        import pyarrow as pa

        values = pa.array(np.array(self._values[name], np.int32))
        return pa.ListArray.from_arrays(pa.array(self._ends[name], pa.int32()), values)


def _span_values(span: Span) -> tuple[int, ...]:
    turn = -1 if span.turn is None else span.turn
    return turn, _ROLES.index(span.role), _KINDS.index(span.kind), span.start, span.end, int(span.supervised)


def _span(turn: int, role: int, kind: int, start: int, end: int, supervised: int) -> Span:
    return Span(None if turn < 0 else turn, _ROLES[role], _KINDS[kind], start, end, bool(supervised))


class ArrowFile:
    """An Arrow stream file that is being written; on disk for good when the block ends well."""

    def __init__(self, path: Path) -> None:
        """Open a new file."""
        self._file = path.open("xb")
        self._pending: list[Any] = []
        self._bytes = 0
        self._writer: Any = None

    def __enter__(self) -> Self:
        return self

    def write(self, batch: Any) -> None:
        """Add a batch; small ones are joined, so that a table has few."""
        self._pending.append(batch)
        self._bytes += batch.nbytes
        if self._bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        table = pa.Table.from_batches(self._pending).combine_chunks()
        if self._writer is None:
            self._writer = pa.ipc.new_stream(self._file, table.schema)
        self._writer.write_table(table)
        self._pending.clear()
        self._bytes = 0

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._file:
            if kind is None:
                self._flush()
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())


class RowTable:
    """Rows of one side of a split.

    A table that is mapped from a file crosses process boundaries as the file's path.
    """

    def __init__(self, source: Path | Any) -> None:
        """Map an Arrow stream file, or take an Arrow table."""
        self._source = source
        self._batches = [batch for batch in _table(source).to_batches() if len(batch)]
        self._starts = [0, *accumulate(map(len, self._batches))]
        self._lists = [{name: _views(batch.column(name)) for name in _LISTS} for batch in self._batches]

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process boundaries as what it was made from."""
        return RowTable, (self._source,)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._starts[-1]

    @property
    def lengths(self) -> Ints:
        """Tokens of each row, int64."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(one["input_ids"][0]) for one in self._lists)])

    def ids_and_labels(self, index: int) -> tuple[Ints, Ints]:
        """Return the ids and labels of a row, int32 views of the table."""
        return self._values("input_ids", index), self._values("labels", index)

    def encoded(self, index: int) -> EncodedRow:
        """Return a row's encoding."""
        ids, labels, spans = (self._values(name, index).tolist() for name in _LISTS)
        fields = zip(*[iter(spans)] * _SPAN_FIELDS, strict=True)
        return EncodedRow(tuple(ids), tuple(labels), tuple(_span(*one) for one in fields))

    def line(self, index: int) -> tuple[int, int, bytes]:
        """Return where a row came from: index of the file, number and bytes of the line."""
        batch, at = self._find(index)
        file, number, line = (self._batches[batch].column(name)[at].as_py() for name in ("file", "number", "line"))
        return file, number, line

    def _values(self, name: str, index: int) -> Ints:
        batch, at = self._find(index)
        offsets, values = self._lists[batch][name]
        return values[offsets[at] : offsets[at + 1]]

    def _find(self, index: int) -> tuple[int, int]:
        batch = bisect_right(self._starts, index) - 1
        return batch, index - self._starts[batch]


def _views(column: Any) -> tuple[Ints, Ints]:
    """Return the offsets and the values of a list column, without a copy."""
    return column.offsets.to_numpy(), column.values.to_numpy()


def _table(source: Path | Any) -> Any:
    import pyarrow as pa

    if not isinstance(source, Path):
        return source
    with pa.memory_map(str(source)) as file:
        return pa.ipc.open_stream(file).read_all()


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
