"""Read the rows of files, a record at a time.

`scan_records`, `read_records` and `read_record` give the rows of each record, of any kind. `scan_rows`, `read_rows` and
`read_row` give the row that is trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pytest_mistral_lora.chat.kinds.records import parse_rows, trained_row
from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.reading import path_of, read_line, scan_lines
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError, RowsError
from pytest_mistral_lora.places import NOWHERE, Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.reading.chunks import DataFile

_Item = TypeVar("_Item")


def scan_records(source: str | Path | DataFile) -> Iterator[tuple[Row, ...] | RowError]:
    """Yield the rows of each record of a JSONL file, or the error that makes it unusable, in file order.

    A file without records yields one error.

    Args:
        source: The file, or one that is converted to rows while it is read, as `formats.sources` opens it.

    Raises:
        InputError: If the file cannot be opened, or is not JSON Lines in UTF-8.
    """
    if isinstance(source, str) or not hasattr(source, "lines"):
        source = path_of(source, "a file of rows")
    path = source if isinstance(source, Path) else source.path
    found = False
    reader, objective = (None, ANSWERS) if isinstance(source, Path) else (source.source, source.objective)
    for number, line in scan_lines(path) if isinstance(source, Path) else source.lines():
        rows = read_record(path, number, line, objective, place=NOWHERE if reader is None else reader.place)
        if rows is not None:
            found = True
            yield rows
    if not found:
        yield RowError("the file has no rows", place=str(path))


def read_record(
    path: Path, number: int, line: bytes | int | RowError, objective: Objective = ANSWERS, *, place: Place = NOWHERE
) -> tuple[Row, ...] | RowError | None:
    """Return the rows of a line of `scan_lines`, the error that makes it unusable, or None if the line is blank.

    Args:
        path: The file.
        number: The number of the line, or of the record that the line was made of.
        line: The line.
        objective: The declared objective of the rows; records that are no conversations take none.
        place: The place of the record; `NOWHERE` for that of the line.
    """
    item = read_line(path, number, line)
    return record_rows(item, objective, place=place or Place.of(path, number))


def record_rows(
    item: tuple[int, Any] | RowError | None, objective: Objective = ANSWERS, *, place: Place
) -> tuple[Row, ...] | RowError | None:
    """Return the rows of a line as `read_line` returns it; see `read_record`."""
    if item is None or isinstance(item, RowError):
        return item
    try:
        rows = parse_rows(item[1], place=place)
        return rows if objective.is_default else tuple(row.with_objective(objective) for row in rows)
    except RowError as error:
        return error


def scan_rows(source: str | Path | DataFile) -> Iterator[Row | RowError]:
    """Yield the row of each record that is trained on, or the error that makes it unusable; see `scan_records`.

    Raises:
        InputError: As for `scan_records`.
    """
    return map(_trained_row, scan_records(source))


def read_row(
    path: Path, number: int, line: bytes | int | RowError, objective: Objective = ANSWERS, *, place: Place = NOWHERE
) -> Row | RowError | None:
    """Return the row of a line that is trained on, the error that makes it unusable, or None; see `read_record`."""
    rows = read_record(path, number, line, objective, place=place)
    return None if rows is None else _trained_row(rows)


def read_rows(source: str | Path | DataFile) -> Iterator[Row]:
    """Yield the row of each record of a file that is trained on; see `read_records`.

    Raises:
        InputError: If the file cannot be opened.
        RowsError: As for `read_records`, and for each record of a kind that is not trained on here.
    """
    return _without_errors(scan_rows(source), source)


def read_records(source: str | Path | DataFile) -> Iterator[tuple[Row, ...]]:
    """Yield the rows of each record of a JSONL file, or of one that `formats.sources` opens.

    Raises:
        InputError: If the file cannot be opened.
        RowsError: After the last record, if any was bad: it lists every bad one. Nothing is dropped silently.
    """
    return _without_errors(scan_records(source), source)


def _without_errors(items: Iterable[_Item | RowError], source: str | Path | DataFile) -> Iterator[_Item]:
    errors: list[RowError] = []
    for item in items:
        if isinstance(item, RowError):
            errors.append(item)
        else:
            yield item
    if errors:
        raise RowsError(errors, place=str(source if isinstance(source, str | Path) else source.path))


def _trained_row(rows: tuple[Row, ...] | RowError) -> Row | RowError:
    if isinstance(rows, RowError):
        return rows
    try:
        return trained_row(rows)
    except RowError as error:
        return error
