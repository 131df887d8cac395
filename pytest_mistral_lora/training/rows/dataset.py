"""Encoded rows in Arrow, in memory or mapped from a file: read one at a time, whatever their number.

The columns of a row: `input_ids` and `labels` (int32, one a token), `spans` (int32, six a span: turn or -1, role, kind,
start, end, supervised), and its origin: `line` (the bytes of its line), `number` (of the line) and `file`
(index among the data files).
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.chat.row_files import read_row
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.records.data_stats import SplitStats

Ints = npt.NDArray[np.integer[Any]]

# the cache holds indices: new roles go to the end
_CHAT_ROLES = (None, "system", "user", "assistant", "tool")
_KINDS: tuple[Any, ...] = ("control", "text", "tool_call", "eos")
_LISTS = ("input_ids", "labels", "spans")
_SPAN_FIELDS = 6
_BATCH_BYTES = 32 * 1024 * 1024
"""Size of a batch in a file: a gigabyte of rows has 32, among which a row is found by bisection."""


def _roles() -> list[str | None]:
    """Return the roles of turns, by their index in the column `spans`."""
    return [*dict.fromkeys((*_CHAT_ROLES, *(role for kind in KINDS.values() for role in kind.roles)))]


@dataclass
class ColumnBuilder:
    """Collects rows, and makes an Arrow record batch of them."""

    # flat arrays of machine integers: a list of Python integers takes eight times the memory
    _values: dict[str, array[int]] = field(default_factory=lambda: {name: array("i") for name in _LISTS})
    _ends: dict[str, list[int]] = field(default_factory=lambda: {name: [0] for name in _LISTS})
    _lines: list[bytes] = field(default_factory=list)
    _numbers: list[int] = field(default_factory=list)
    _roles: list[str | None] = field(default_factory=_roles)

    def add(self, encoded: EncodedRow, number: int, line: bytes) -> None:
        """Add a row, with the number and the bytes of its line."""
        spans = (
            value
            for span in encoded.spans
            for value in (
                -1 if span.turn is None else span.turn,
                self._roles.index(span.role),
                _KINDS.index(span.kind),
                span.start,
                span.end,
                int(span.supervised),
            )
        )
        for name, values in zip(_LISTS, (encoded.input_ids, encoded.labels or (), spans), strict=True):
            self._values[name].extend(values)
            self._ends[name].append(len(self._values[name]))
        self._lines.append(line)
        self._numbers.append(number)

    def batch(self, file: int) -> Any:
        """Return the rows, all of one data file, as an Arrow record batch."""
        import pyarrow as pa

        columns = {}
        for name in _LISTS:
            ends, values = _numbers(self._ends[name], np.int32), _numbers(self._values[name], np.int32)
            columns[name] = pa.ListArray.from_arrays(ends, values)
        columns["line"] = _texts(self._lines)
        columns["number"] = _numbers(self._numbers, np.int64)
        columns["file"] = _numbers([file] * len(self._lines), np.int32)
        return pa.record_batch(columns)


def _numbers(values: Sequence[int], dtype: type[np.signedinteger[Any]]) -> Any:
    """Return numbers as an Arrow array; `pa.array` would import pandas, for half a second, to recognise its arrays."""
    import pyarrow as pa

    numbers = np.array(values, dtype)
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(numbers), [None, pa.py_buffer(numbers)])


def _view(numbers: Any) -> Ints:
    """Return an Arrow array of int32, without nulls, as a view; its own `to_numpy` would import pandas, too."""
    if not len(numbers):  # it may have no memory
        return np.zeros(0, np.int32)
    return np.frombuffer(numbers.buffers()[1], np.int32, len(numbers), numbers.offset * np.dtype(np.int32).itemsize)


def _texts(values: Sequence[bytes]) -> Any:
    """Return texts as an Arrow array of type `binary`."""
    import pyarrow as pa

    ends = np.array([0, *accumulate(map(len, values))], np.int32)
    return pa.Array.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))])


class ArrowFile(AbstractContextManager["ArrowFile"]):
    """An Arrow stream file that is being written; synced to the disk when the block ends without an error."""

    def __init__(self, path: Path) -> None:
        """Open a new file."""
        self._file = path.open("xb")
        self._pending: list[Any] = []
        self._bytes = 0
        self._writer: Any = None

    def write(self, batch: Any) -> None:
        """Add a batch; small ones are joined, so that a table has few."""
        self._pending.append(batch)
        self._bytes += batch.nbytes
        if self._bytes >= _BATCH_BYTES:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        table = pa.Table.from_batches(self._pending).combine_chunks()
        if self._writer is None:  # the schema comes with the first batch
            self._writer = pa.ipc.new_stream(self._file, table.schema)
        self._writer.write_table(table)
        self._pending.clear()
        self._bytes = 0

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._file:
            # after an error, the file stays incomplete, and its opener removes the folder
            if kind is None:
                self._flush()
                self._writer.close()
                self._file.flush()
                os.fsync(self._file.fileno())


class RowTable:
    """Rows of one side of a split.

    A table mapped from a file crosses process boundaries as the file's path.
    """

    def __init__(self, source: Path | Any) -> None:
        """Map an Arrow stream file, or take an Arrow table."""
        self._source = source
        table: Any = source
        if isinstance(source, Path):
            import pyarrow as pa

            with pa.memory_map(str(source)) as file:
                table = pa.ipc.open_stream(file).read_all()
        self._batches = [batch for batch in table.to_batches() if len(batch)]
        self._starts = [0, *accumulate(map(len, self._batches))]
        self._lists: list[dict[str, tuple[Ints, Ints]]] = []
        """By batch and column, the offsets and the values of its lists."""
        for batch in self._batches:
            columns = {name: batch.column(name) for name in _LISTS}
            self._lists.append({name: (_view(lists.offsets), _view(lists.values)) for name, lists in columns.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        """Cross process boundaries as the path, or the table, that it was made from."""
        # a worker that maps the same file shares its pages in memory with this process
        return RowTable, (self._source,)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._starts[-1]

    @property
    def lengths(self) -> Ints:
        """Tokens of each row, int64."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(columns["input_ids"][0]) for columns in self._lists)])

    @cached_property
    def input_tokens(self) -> Ints:
        """Tokens of each row before its last supervised one, int64; 0 without a token to predict."""
        return np.concatenate([np.zeros(0, np.int64), *(_input_tokens(*columns["labels"]) for columns in self._lists)])

    def values(self, name: str, index: int) -> Ints:
        """Return the values of a row in a column of lists, an int32 view of the table."""
        batch, at = self._find(index)
        offsets, values = self._lists[batch][name]
        return values[offsets[at] : offsets[at + 1]]

    def line(self, index: int) -> tuple[int, int, bytes]:
        """Return the origin of a row: index of the file, number and bytes of the line."""
        batch, at = self._find(index)
        file, number, line = (self._batches[batch].column(name)[at].as_py() for name in ("file", "number", "line"))
        return file, number, line

    def _find(self, index: int) -> tuple[int, int]:
        batch = bisect_right(self._starts, index) - 1
        return batch, index - self._starts[batch]


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Lazy(Sequence[T]):
    """A sequence whose items are made on access; a slice is a tuple."""

    table: RowTable

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        positions = range(len(self))[index]
        return self._at(positions) if isinstance(positions, int) else tuple(map(self._at, positions))

    def _at(self, index: int) -> T:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class EncodedRows(_Lazy[EncodedRow]):
    """The encodings of a table, each made on access.

    Attributes:
        table: The table.
        figures: The hashes and numbers of its rows.
    """

    figures: SplitStats

    def _at(self, index: int) -> EncodedRow:
        ids, labels, spans = (self.table.values(name, index).tolist() for name in _LISTS)
        found, roles = [], _roles()
        for turn, role, kind, start, end, supervised in zip(*[iter(spans)] * _SPAN_FIELDS, strict=True):
            span_turn = None if turn < 0 else turn
            found.append(Span(span_turn, roles[role], _KINDS[kind], start, end, bool(supervised)))
        return EncodedRow(tuple(ids), tuple(labels), tuple(found))


@dataclass(frozen=True, eq=False)
class ReparsedRows(_Lazy[Row]):
    """The rows of a table, each parsed again from its line on access: text is not kept in memory.

    Attributes:
        table: The table.
        files: The data files that its rows came from.
    """

    files: Sequence[DataFile]

    def _at(self, index: int) -> Row:
        file, number, line = self.table.line(index)
        source = self.files[file]
        row = read_row(source.path, number, line, source.objective)
        if not isinstance(row, Row):
            raise row or ValueError(f"line {number} of {source.path} has no row")
        return row


def lengths_of(encoded: Sequence[EncodedRow]) -> Ints:
    """Return the tokens of each row, `(rows,)` int64."""
    if isinstance(encoded, EncodedRows):
        return encoded.table.lengths
    return np.array([len(row.input_ids) for row in encoded], np.int64)


def input_tokens_of(encoded: Sequence[EncodedRow]) -> Ints:
    """Return the tokens of each row before its last supervised one, `(rows,)` int64: a step feeds these.

    A row without a token to predict has 0.
    """
    if isinstance(encoded, EncodedRows):
        return encoded.table.input_tokens
    labels = [np.array(row.labels or ()) for row in encoded]
    ends = np.cumsum([0, *map(len, labels)])
    return _input_tokens(ends, np.concatenate([np.zeros(0, np.int64), *labels]))


def _input_tokens(offsets: Ints, labels: Ints) -> Ints:
    starts, ends = offsets[:-1].astype(np.int64), offsets[1:].astype(np.int64)
    supervised = np.flatnonzero(labels != IGNORE_INDEX)
    # the last supervised place before the end of each row; -1 before the first of all
    last = np.concatenate([[-1], supervised])[np.searchsorted(supervised, ends)]
    return np.maximum(last - starts, 0)


@dataclass(frozen=True, eq=False)
class RowDataset:
    """Encoded rows as a map-style dataset of `input_ids` and `labels`, each `(length,)` int64, and `row`, unpadded."""

    # not a subclass of PyTorch's Dataset: processes that only encode import this module, and need no torch
    encoded: Sequence[EncodedRow]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row, and its place."""
        # straight from the columns: an EncodedRow would first make Python integers
        if isinstance(self.encoded, EncodedRows):
            ids, labels = (self.encoded.table.values(name, index) for name in ("input_ids", "labels"))
        else:
            row = self.encoded[index]
            ids, labels = np.array(row.input_ids), np.array(row.labels or ())
        # embeddings and cross entropy of PyTorch take int64; the table has half of that
        return {"input_ids": ids.astype(np.int64), "labels": labels.astype(np.int64), "row": index}
