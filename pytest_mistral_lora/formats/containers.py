"""Read the records of a file or folder, one at a time: lines, a JSON array, CSV, Parquet, Arrow, compressed or not.

Memory holds one record, one line or one batch of a table, never a file.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from pytest_mistral_lora.chat.container import (
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
from pytest_mistral_lora.chat.reading import STRICT, fault_of, limits, lines_of, opened, read_line
from pytest_mistral_lora.chat.reading.row_source import UnparsedLine
from pytest_mistral_lora.chat.remedies import AGAIN, json_step, unpack_step, unreadable
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.extras import require_extra
from pytest_mistral_lora.formats import tables
from pytest_mistral_lora.formats.tables import refuse_two_columns
from pytest_mistral_lora.places import Place

_BATCH = 256
_CHUNK = 1 << 16
_SPACE = re.compile(r"\s*")
_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


class Record(NamedTuple):
    """One record of a source.

    Attributes:
        place: `file:line`; `file record N, line N` if a record is not a line; of a table `file:row`, with rows from 1.
        value: The record as plain data, or the error that makes it unreadable; an `UnparsedLine` if lines are wanted.
    """

    place: Place
    value: Any


@dataclass(frozen=True, slots=True)
class ContainerReader:
    """The reader of one kind of container.

    Attributes:
        name: Its name: a name of `chat.container`.
        records: Yields the records of a file, given its path, the layers around the records, and the function that
            takes the number of bytes read since its last call.
        is_table: Whether it is a table of Arrow: absent keys are read as null, and the file may not be
            compressed or in another encoding.
        lines: Yields the records as `records` does, but lines before they are parsed; None if no record is a line.
    """

    name: str
    records: Callable[[Path, Container, Callable[[int], None]], Iterator[Record]]
    is_table: bool = False
    lines: Callable[[Path, Container, Callable[[int], None]], Iterator[Record]] | None = None


@dataclass(frozen=True)
class SourceFile:
    """A file that holds records.

    Attributes:
        title: The container in words: `JSON Lines`, `gzip of a JSON array`.
        padded: Whether absent keys are read as null, as in the tables of Arrow.
        records: Yields the records, and calls the function with the number of bytes read since the last call.
        unparsed: Yields the same records, but lines of JSON before they are parsed.
    """

    title: str
    padded: bool
    records: Callable[[Callable[[int], None]], Iterator[Record]]
    unparsed: Callable[[Callable[[int], None]], Iterator[Record]]


def open_source(path: Path) -> SourceFile:
    """Recognise the container of a file.

    Raises:
        InputError: If the file cannot be read, or its format is never read.
    """
    with _readable(path), opened(path) as file:
        outer = container_of(file.peek(_CHUNK), path)
    inner = outer
    if outer.is_packed:
        step = unpack_step(outer.compression, path)
        raise InputError(f"this is {outer.title}", place=str(path), expected="gzip, or no compression", next_step=step)
    if not outer.name:
        with _decoded(path, outer) as (file, _), _readable(path):
            inner = container_of(file.peek(_CHUNK), path)
    reader, title = _READERS.get(inner.name), outer.title if outer is inner else f"{outer.title} of {inner.title}"
    if reader is None or (outer is not inner and reader.is_table):
        raise InputError(f"this is {title}", place=str(path), next_step=unpack_step(outer.compression, path))
    records, lines = (partial(read, path, outer) for read in (reader.records, reader.lines or reader.records))
    return SourceFile(title, reader.is_table, records, lines)


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
        if container.compression:
            file = _Counted(stack.enter_context(gzip.open(raw, "rb")), limits.Expansion(path))
        if container.encoding:
            file = _AsUtf8(file, container.encoding)
        yield (file if isinstance(file, io.BufferedReader) else io.BufferedReader(file, _CHUNK)), raw


class _Counted(io.RawIOBase):
    """A file whose bytes are counted."""

    def __init__(self, file: gzip.GzipFile, expansion: limits.Expansion) -> None:
        self._file = file
        self._expansion = expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._expansion.count(len(data))
        buffer[: len(data)] = data
        return len(data)


class _AsUtf8(io.RawIOBase):
    """A file in another encoding, read as a file in UTF-8."""

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


def _text_records(
    read: Callable[[Path, io.BufferedReader], Iterator[Record]],
    path: Path,
    outer: Container,
    progress: Callable[[int], None],
) -> Iterator[Record]:
    before = 0
    with _readable(path), _decoded(path, outer) as (file, raw):
        for count, record in enumerate(read(path, file), start=1):
            if count % _BATCH == 0:
                progress(raw.tell() - before)
                before = raw.tell()
            yield record
        progress(path.stat().st_size - before)


def _line_records(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    for place, value in _unparsed_records(path, file):
        yield Record(place, value.parsed() if isinstance(value, UnparsedLine) else value)


def _unparsed_records(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    for number, line in lines_of(file):
        # any other line may be blank, or too large
        if isinstance(line, bytes) and line.startswith(b"{"):
            yield Record(Place.of(path, number), UnparsedLine(path, number, line))
            continue
        item = read_line(path, number, line)
        if item is not None:
            yield Record(Place.of(path, number), item if isinstance(item, RowError) else item[1])


def _value_records(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    """Yield the values of a JSON array, or of JSON objects that follow each other, without reading the whole file.

    Raises:
        InputError: If the text is not JSON: without line ends, reading cannot go on behind the fault.
    """
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as wrapped:
        text = _JsonText(wrapped)
        in_array = text.skip("[")
        number = 0
        while text.next() not in ("", "]" if in_array else ""):
            number += 1
            place = Place.of(path, number, text.line)
            yield Record(place, _next_value(place, text))
            if in_array and text.skip(","):
                if text.next() == "]":
                    raise InputError("not valid JSON: a trailing comma at the end of the array", place=place)
            elif in_array and text.next() not in ("]", ""):
                raise InputError("not valid JSON: no comma after the row", place=place)
        if in_array and not text.skip("]"):
            raise InputError("the array is cut off: its closing bracket is missing", place=str(path), next_step=AGAIN)
        if in_array and text.next():
            raise InputError("text follows the array", place=Place.of(path, number, text.line))


class _JsonText:
    """The text of a file, as much of it as a value needs.

    Attributes:
        kept: Some of the text.
        at: The place in it where the next value begins.
    """

    def __init__(self, file: io.TextIOWrapper) -> None:
        self._file = file
        self.kept: str = ""
        self.at: int = 0
        self._line, self._counted = 1, 0

    @property
    def line(self) -> int:
        """The line of the place where the next value begins, from 1."""
        self._count_lines()
        return self._line

    def _count_lines(self) -> None:
        self._line += self.kept.count("\n", self._counted, self.at)
        self._counted = self.at

    def next(self) -> str:
        """Return the next character that is not white space; empty at the end of the file."""
        while True:
            self.at = cast("re.Match[str]", _SPACE.match(self.kept, self.at)).end()
            if self.at < len(self.kept) or not self.read(_CHUNK):
                return self.kept[self.at : self.at + 1]

    def skip(self, character: str) -> bool:
        """Go on behind the next character if it is this one, and return whether it is."""
        found = self.next() == character
        self.at += found
        return found

    def read(self, size: int) -> bool:
        """Read more of the file, and return whether it had more; the text before the next value is dropped."""
        more = self._file.read(size)
        self._count_lines()
        # only here, and not behind each value: else a long text would be copied for each short value in it
        self.kept, self.at, self._counted = self.kept[self.at :] + more, 0, 0
        return bool(more)


def _next_value(place: Place, text: _JsonText) -> Any:
    """Return the next value, or its error."""
    size, most = _CHUNK, limits.MAX_ROW_BYTES
    while True:
        start = text.at
        try:
            try:
                value, end = STRICT.raw_decode(text.kept, start)
            except json.JSONDecodeError:
                raise
            except ValueError as error:
                # JSON without a single meaning: the next row can still be found
                value = RowError(str(error), place=place, next_step=json_step(str(error)))
                end = json.JSONDecoder().raw_decode(text.kept, start)[1]
            long = end - start
            # a number may go on behind the cut: of a cut `1e+5`, the reader takes only `1`
            is_open = end + 2 >= len(text.kept) and text.kept[end - 1] not in '}]"'
            if is_open and long <= most and text.read(size):
                size *= 2
                continue
            # even if nothing more was read, the text before the value was dropped
            text.at += long
            return limits.row_too_large(long, place) if long > most else value
        except RecursionError as error:
            raise InputError("JSON is nested too deeply", place=place) from error
        except json.JSONDecodeError as error:
            # only a fault at the end of the text can come from the cut
            cut = error.msg.startswith("Unterminated string") or error.pos >= len(text.kept) - 16
            length = len(text.kept) - start
            if cut and length > most:
                found = f"the row has {length:,} bytes and more"
                raise InputError(found, place=place, expected=limits.at_most(most)) from error
            # twice as much each time: a long value is parsed a few times, not once a chunk
            if cut and text.read(min(size, most + 1 - length)):
                size *= 2
                continue
            near = error.doc[max(start, error.pos - 20) : error.pos + 20]
            found = f"not valid JSON: {fault_of(error)} near {near!r}"
            if error.msg.startswith("Unterminated string") or not error.doc[error.pos :].strip():
                found = "the file is cut off: it ends inside this row"
            raise InputError(found, place=place) from error


def _csv_records(path: Path, file: io.BufferedReader) -> Iterator[Record]:
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        # the limit holds for the whole process, so never lower it: `_CsvLines` bounds the rows
        csv.field_size_limit(max(csv.field_size_limit(), limits.MAX_ROW_BYTES))
        lines = _CsvLines(path, text)
        first = next((line for line in lines if line.strip()), "")
        # a spreadsheet writes semicolons if the comma is the decimal mark
        delimiter = max("\t,;", key=first.count)
        header: list[str] = []
        try:
            for cells in csv.reader(chain([first], lines), delimiter=delimiter, strict=True):
                place = lines.place
                lines.start_row()
                if not header:
                    header = cells
                    refuse_two_columns(header, Place.of(path, line=lines.line))
                    continue
                if not cells:
                    continue
                lines.rows += 1
                value: Any = dict(zip(header, cells, strict=False))
                if len(cells) != len(header):
                    found = f"{len(cells)} fields; the header has {len(header)}"
                    value = RowError(found, place=place, expected="as many fields as the header has")
                yield Record(place, value)
        except csv.Error as error:
            step = "Quote fields with quotes."
            raise InputError(f"not valid CSV: {error}", place=lines.place, next_step=step) from error


class _CsvLines:
    """The lines of a CSV file, as the reader of CSV takes them: one or more for each row.

    Attributes:
        rows: Number of complete rows.
        size: Characters of the current row.
        line: The number of the last line that was read.
    """

    def __init__(self, path: Path, text: io.TextIOWrapper) -> None:
        self._path = path
        self._text = text
        self.rows: int = 0
        self.size: int = 0
        self.line: int = 0
        self._first = 1

    @property
    def place(self) -> Place:
        """The place of the current row."""
        return Place.of(self._path, self.rows + 1, self._first)

    def start_row(self) -> None:
        """Take the next line for the first of the next row."""
        self.size, self._first = 0, self.line + 1

    def __iter__(self) -> Iterator[str]:
        """Yield the lines.

        Raises:
            InputError: If a row is too large: a missing quote can turn the rest of the file into one row.
        """
        most = limits.MAX_ROW_BYTES
        while line := self._text.readline(most + 1 - self.size):
            self.size += len(line)
            if self.size > most:
                found, step = f"the row has {self.size:,} bytes and more", "Look for a quote that is not closed."
                raise InputError(found, place=self.place, expected=limits.at_most(most), next_step=step)
            self.line += 1
            yield line


def _table_records(name: str, path: Path, outer: Container, progress: Callable[[int], None]) -> Iterator[Record]:
    require_extra("parquet")
    for piece in tables.pieces(path, name):
        for number, value in enumerate(piece.values, start=piece.first):
            place = Place.of(path, number)
            yield Record(place, limits.row_too_large(value, place) if isinstance(value, int) else value)
        progress(piece.read)


def _text_reader(
    name: str,
    read: Callable[[Path, io.BufferedReader], Iterator[Record]],
    lines: Callable[[Path, io.BufferedReader], Iterator[Record]] | None = None,
) -> ContainerReader:
    return ContainerReader(
        name, partial(_text_records, read), lines=None if lines is None else partial(_text_records, lines)
    )


def _table_reader(name: str) -> ContainerReader:
    return ContainerReader(name, partial(_table_records, name), is_table=True)


_READERS = {
    reader.name: reader
    for reader in (
        _text_reader(LINES, _line_records, _unparsed_records),
        _text_reader(ARRAY, _value_records),
        _text_reader(VALUES, _value_records),
        _text_reader(CSV, _csv_records),
        _text_reader(TSV, _csv_records),
        _table_reader(PARQUET),
        _table_reader(ARROW_FILE),
        _table_reader(ARROW_STREAM),
    )
}
"""Every supported container, by name."""
