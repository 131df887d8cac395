"""Read the records of a file or folder, one at a time: lines, a JSON array, CSV, Parquet, Arrow, compressed or not.

Memory holds one record, one line or one batch of a table, never a file.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from pytest_mistral_lora.chat.formats import (
    ARRAY,
    ARROW_FILE,
    ARROW_STREAM,
    CSV,
    LINES,
    PARQUET,
    TSV,
    VALUES,
    Container,
    container_of,
)
from pytest_mistral_lora.chat.reading import MAX_LINE_BYTES, STRICT, fault_of, lines_of, opened, read_line
from pytest_mistral_lora.chat.remedies import AGAIN, json_step, unpack_step, unreadable
from pytest_mistral_lora.errors import InputError, RowError

_BATCH = 256
_CHUNK = 1 << 16
_TABLES = (PARQUET, ARROW_FILE, ARROW_STREAM)
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError)


class Record(NamedTuple):
    """One record of a source.

    Attributes:
        place: `file:line`, or `file:row` with rows from 1 if the file has no lines of its own.
        value: The record as plain data, or the error that makes it unreadable.
    """

    place: str
    value: Any


@dataclass(frozen=True)
class SourceFile:
    """A file that holds records.

    Attributes:
        title: The container in words: `JSON Lines`, `gzip of a JSON array`.
        padded: Whether absent keys come as null, as in the tables of Arrow.
        records: Yields the records, and calls the function with the number of bytes read since the last call.
    """

    title: str
    padded: bool
    records: Callable[[Callable[[int], None]], Iterator[Record]]


def open_source(path: Path) -> SourceFile:
    """Recognise the container of a file.

    Raises:
        InputError: If it cannot be read, or is a format that is never read.
    """
    with _readable(path), opened(path) as file:
        outer = container_of(file.peek(_CHUNK), path)
    inner = outer
    if not outer.name:
        with _decoded(path, outer) as (file, _), _readable(path):
            inner = container_of(file.peek(_CHUNK), path)
            if inner.encoding and outer.compression:  # a compressed file may hold UTF-16
                outer = Container("", outer.compression, inner.encoding)
                with _decoded(path, outer) as (again, _):
                    inner = container_of(again.peek(_CHUNK), path)
    if not inner.name or (outer is not inner and inner.name in _TABLES):
        step = unpack_step(outer.compression, path)
        raise InputError(f"this is {outer.title} of {inner.title}", place=str(path), next_step=step)
    if inner.name in _TABLES:
        return SourceFile(inner.name, True, lambda progress: _table_records(path, inner.name, progress))
    layers = [name for name in (outer.compression, outer.encoding, inner.name) if name]
    return SourceFile(" of ".join(layers), False, lambda progress: _text_records(path, outer, inner.name, progress))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading into an error of the file."""
    try:
        yield
    except (UnicodeDecodeError, OSError, *_DAMAGE) as error:
        raise unreadable(error, path) from error


@contextmanager
def _decoded(path: Path, container: Container) -> Iterator[tuple[io.BufferedReader, BinaryIO]]:
    """Yield a file as UTF-8, decompressed, and the file of bytes below, whose position shows progress."""
    with ExitStack() as stack:
        raw = stack.enter_context(opened(path))
        file: Any = raw
        if container.compression == "zstd":
            import pyarrow as pa

            file = stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
        elif container.compression:
            opener = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[container.compression]
            file = stack.enter_context(cast(Any, opener)(raw, "rb"))
        if container.encoding:
            file = _AsUtf8(file, container.encoding)
        yield (file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)), raw


class _AsUtf8(io.RawIOBase):
    """A file in another encoding, as a file in UTF-8."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file = file
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._rest = b""
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and not self._ended:
            data = self._file.read(_CHUNK)
            self._ended = not data
            self._rest = self._decoder.decode(data, final=self._ended).encode()
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def _text_records(path: Path, outer: Container, name: str, progress: Callable[[int], None]) -> Iterator[Record]:
    read = {LINES: _line_records, ARRAY: _value_records, VALUES: _value_records, CSV: _csv_records, TSV: _csv_records}
    before = 0
    with _readable(path), _decoded(path, outer) as (file, raw):
        for count, record in enumerate(read[name](path, file), start=1):
            if count % _BATCH == 0:
                progress(raw.tell() - before)
                before = raw.tell()
            yield record
        progress(path.stat().st_size - before)


def _line_records(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    for number, line in lines_of(file):
        item = read_line(path, number, line)
        if item is not None:
            yield Record(f"{path}:{number}", item if isinstance(item, RowError) else item[1])


def _value_records(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    """Yield the values of a JSON array, or of JSON objects that follow each other, without reading the whole file.

    Raises:
        InputError: If the text is not JSON: there is no line end to go on from.
    """
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        buffer = _filled("", text)
        in_array = buffer[:1] == "["
        buffer = _filled(buffer[in_array:], text)
        number = 0
        while buffer and not (in_array and buffer[0] == "]"):
            number += 1
            value, buffer = _next_value(f"{path}:{number}", buffer, text)
            yield Record(f"{path}:{number}", value)
            buffer = _filled(buffer, text)
            if in_array and buffer[:1] == ",":
                buffer = _filled(buffer[1:], text)
                if buffer[:1] == "]":
                    raise InputError(
                        "not valid JSON: a trailing comma at the end of the array", place=f"{path}:{number}"
                    )
            elif in_array and buffer[:1] not in ("]", ""):
                raise InputError("not valid JSON: no comma after the row", place=f"{path}:{number}")
        if in_array and not buffer:
            raise InputError("the array is cut off: its closing bracket is missing", place=str(path), next_step=AGAIN)
        if in_array and _filled(buffer[1:], text):
            raise InputError("text follows the array", place=f"{path}:{number}")


def _filled(buffer: str, text: io.TextIOWrapper) -> str:
    """Return the text without white space at its start, and with more of the file if nothing is left."""
    buffer = buffer.lstrip()
    while not buffer and (more := text.read(_CHUNK)):
        buffer = more.lstrip()
    return buffer


def _next_value(place: str, buffer: str, text: io.TextIOWrapper) -> tuple[Any, str]:
    """Return a value, or its error, and the text behind it."""
    size = _CHUNK
    while True:
        try:
            try:
                value, end = STRICT.raw_decode(buffer)
            except json.JSONDecodeError:
                raise
            except ValueError as error:
                # JSON, but not of one meaning: the next row can be found
                refused = RowError(str(error), place=place, next_step=json_step(str(error)))
                value, end = refused, json.JSONDecoder().raw_decode(buffer)[1]
            return value, buffer[end:]
        except RecursionError as error:
            raise InputError("JSON is nested too deeply", place=place) from error
        except json.JSONDecodeError as error:
            # only a fault at the end of the buffer can come from the cut
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(buffer) - 16
            more = text.read(size) if cut and len(buffer) <= MAX_LINE_BYTES else ""
            if not more:
                shown = f"near {buffer[max(0, error.pos - 20) : error.pos + 20]!r}"
                found = f"not valid JSON: {fault_of(error)} {shown}"
                if len(buffer) > MAX_LINE_BYTES:
                    found = f"the row is longer than {MAX_LINE_BYTES >> 20} MiB"
                elif error.msg.startswith("Unterminated string") or not buffer[error.pos :].strip():
                    found = "the file is cut off: it ends inside this row"
                raise InputError(found, place=place) from error
            # twice as much each time: a long value is parsed a few times, not once a chunk
            buffer, size = buffer + more, 2 * size


def _csv_records(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        csv.field_size_limit(MAX_LINE_BYTES)
        first = next((line for line in iter(lambda: text.readline(MAX_LINE_BYTES), "") if line.strip()), "")
        # a spreadsheet writes semicolons where the comma is the decimal mark
        delimiter = max("\t,;", key=first.count)
        header: list[str] = []
        number = 0
        try:
            for cells in filter(None, csv.reader(chain([first], text), delimiter=delimiter, strict=True)):
                place = f"{path}:{number + 1}"
                if not header:
                    header = cells
                    _refuse_two_columns(header, place)
                    continue
                number += 1
                value: Any = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    found = f"{len(cells)} fields; the header has {len(header)}"
                    value = RowError(found, place=place, expected="as many fields as the header has")
                yield Record(place, value)
        except csv.Error as error:
            place, step = f"{path}:{number + 1}", "Quote fields with quotes."
            raise InputError(f"not valid CSV: {error}", place=place, next_step=step) from error


def _refuse_two_columns(names: Sequence[str], place: str) -> None:
    """Refuse a table of which two columns have one name: one of them would be lost."""
    if len(set(names)) < len(names):
        raise InputError(f"two columns have one name: {', '.join(names)}", place=place)


def _table_records(path: Path, name: str, progress: Callable[[int], None]) -> Iterator[Record]:
    import pyarrow as pa
    from pyarrow import parquet

    number, size = 0, path.stat().st_size
    try:
        with ExitStack() as stack:
            batches: Any
            if name == PARQUET:
                table = stack.enter_context(parquet.ParquetFile(path))
                batches, total = table.iter_batches(_BATCH), max(1, table.metadata.num_rows)
            else:
                mapped = stack.enter_context(pa.memory_map(str(path)))
                if name == ARROW_FILE:
                    reader = pa.ipc.open_file(mapped)
                    batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
                else:
                    batches = pa.ipc.open_stream(mapped)
                total = 0
            for batch in batches:
                _refuse_two_columns(batch.schema.names, str(path))
                # a batch of an Arrow file may hold the whole of it
                for start in range(0, batch.num_rows, _BATCH):
                    for value in batch.slice(start, _BATCH).to_pylist():
                        number += 1
                        yield Record(f"{path}:{number}", value)
                progress(size * batch.num_rows // total if total else batch.nbytes)
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"cannot be read as {name}: {error}", place=str(path), next_step=AGAIN) from error
    except (ValueError, OverflowError) as error:
        # values that Python does not have: a year beyond 9999, an object with two fields of one name
        raise InputError(f"a row after row {number} cannot be read: {error}", place=str(path)) from error
