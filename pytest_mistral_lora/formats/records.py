"""Read the records of a path without converting them: from a file in any container, or from a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.containers import Record, SourceFile, open_source
from pytest_mistral_lora.formats.conversation import MESSAGE_LISTS
from pytest_mistral_lora.formats.files import every_file
from pytest_mistral_lora.formats.tool_calls import from_json, without_nulls
from pytest_mistral_lora.places import Place

LOOKED_AT = 20
"""The first records of a source, by which its form is recognised."""

_ARGUMENTS = "arguments"


def first_records(path: Path) -> tuple[str, list[Record]]:
    """Return the container of a file in words, and its first records.

    Raises:
        InputError: If the file cannot be read, or its format is never read.
    """
    file = open_source(path)
    return file.title, list(islice(file.records(lambda read: None), LOOKED_AT))


def records_of(path: Path, progress: Callable[[int], None]) -> Iterator[tuple[SourceFile, Record]]:
    """Yield each record of a path with its file, lines unparsed; for a folder, in the order of its files and splits.

    Args:
        path: A data file, or a folder of them.
        progress: Called with the number of bytes read since the last call.

    Raises:
        InputError: If a file cannot be read, or a folder has none.
    """
    files = every_file(path)
    if path.is_dir() and not files:
        raise InputError("has no data files", place=str(path), expected="encoded rows")
    for name in files:
        file = open_source(name)
        for record in file.unparsed(progress):
            yield file, record


def plain_row(record: Mapping[str, Any], place: Place, *, padded: bool) -> dict[str, Any]:
    """Return a record with the JSON of its messages and tools parsed, and without the nulls that stand for absent keys.

    A null in the arguments of a call is kept, since it may be a part of the row: `unpadded_calls` leaves it out.

    Args:
        record: The record.
        place: Its place.
        padded: Whether absent keys are null, as in a table of Arrow.

    Raises:
        RowError: If a text that should be JSON is not.
    """
    row = {key: value for key, value in record.items() if value is not None or not padded}
    for key in ("tools", *MESSAGE_LISTS):
        if isinstance(row.get(key), str):
            # trainers take tools as JSON: a column has one type, and schemas differ
            row[key] = from_json(row[key], [], place / key)
        elif key in row and padded:
            row[key] = with_objects(row[key], place / key)
            row[key] = _without_padding(row[key])
    return row


def with_objects(value: Any, place: Place) -> Any:
    """Return a list of a table with its JSON texts parsed: `datasets` writes objects of different types as JSON.

    Raises:
        RowError: If a text is not JSON.
    """
    if not isinstance(value, list):
        return value
    return [from_json(item, [], place / n) if isinstance(item, str) else item for n, item in enumerate(value)]


def unpadded_calls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of `plain_row` without the nulls in the arguments of its calls."""
    return {
        key: without_nulls(value, [], keep=(_ARGUMENTS,)) if key in MESSAGE_LISTS else value
        for key, value in row.items()
    }


def _without_padding(value: Any) -> Any:
    """Return a value without null keys, at any depth; arguments are not changed."""
    if isinstance(value, Mapping):
        return {
            key: item if key == _ARGUMENTS else _without_padding(item)
            for key, item in value.items()
            if item is not None or key == _ARGUMENTS
        }
    return [_without_padding(item) for item in value] if isinstance(value, list) else value
