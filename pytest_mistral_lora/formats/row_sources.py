"""Sources of encoded rows: files and folders, values of Python, and the output of a trainer that got known rows.

Records of Python values pass the same normalisation as the lines of a JSON file, so that a file and the same rows in
memory have one verdict.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import limits, loads_strict
from pytest_mistral_lora.chat.reading.row_source import RowSource, SourceRecord
from pytest_mistral_lora.chat.remedies import json_step
from pytest_mistral_lora.errors import InputError, RowError, one_line
from pytest_mistral_lora.formats.records import LOOKED_AT, records_of
from pytest_mistral_lora.formats.tables import refuse_two_columns
from pytest_mistral_lora.places import NamedSource, Place

_ENDLESS = "a value holds itself, or is nested too deeply"
_BATCH = 256


@dataclass(frozen=True, slots=True)
class FileRows:
    """The records of a file, or of a folder such as one of `Dataset.save_to_disk`.

    Attributes:
        path: The file or folder.
    """

    path: Path
    is_repeatable: bool = True
    is_sample: bool = False

    @property
    def place(self) -> Place:
        """The place of the file or folder."""
        return Place.of(self.path)

    def records(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[SourceRecord]:
        """Yield the records; see `RowSource.records`.

        Raises:
            InputError: If a file cannot be read, or a folder has none.
        """
        for file, record in records_of(self.path, progress):
            yield SourceRecord(record.place, record.value, file.padded)


@dataclass(frozen=True, slots=True)
class MadeRows:
    """The records of a file that a trainer made of known rows: each has the place of the row that it was made of.

    Attributes:
        file: The file.
        places: The place of each row, in order.
        place: The place of all rows together.
    """

    file: FileRows
    places: Sequence[Place]
    place: Place
    is_repeatable: bool = True
    is_sample: bool = False

    def records(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[SourceRecord]:
        """Yield the records; see `RowSource.records`."""
        for number, record in enumerate(self.file.records(progress)):
            place = self.places[number] if number < len(self.places) else self.place
            value = record.value
            if isinstance(value, RowError):
                value = RowError(value.found, place=place, expected=value.expected, next_step=value.next_step)
            yield SourceRecord(place, value, record.is_padded)


@dataclass(frozen=True, slots=True)
class ListedRows:
    """Records in memory, each with its place.

    Attributes:
        place: The place of all records together.
        listed: The place and the value of each record.
        is_padded: Whether absent keys are null, as in a table of Arrow.
        is_sample: As for `RowSource`.
    """

    place: Place
    listed: Sequence[tuple[Place, Mapping[str, Any]]]
    is_padded: bool = False
    is_sample: bool = False
    is_repeatable: bool = True

    def records(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[SourceRecord]:
        """Yield the records; see `RowSource.records`.

        Raises:
            InputError: If a value has a type that JSON lacks.
        """
        for place, value in self.listed:
            yield SourceRecord(place, _as_read(value, place), self.is_padded)


class ValueRows:
    """The rows of a Python value: mappings, a `datasets.Dataset` or `DatasetDict`, a batch, or batches.

    Attributes:
        place: The place of the value as a whole: its name.
        is_repeatable: Whether it is no iterator, and no loader of batches, which may shuffle its rows each time.
        is_sample: Whether there may be more rows: no.
    """

    is_sample = False

    def __init__(self, rows: Any, name: str) -> None:
        """Take the value.

        Args:
            rows: The value, as `audit` takes it.
            name: Its name for places, such as `rows`.

        Raises:
            InputError: If it has another type, or is a batch without ids.
        """
        self.place: Place = Place(NamedSource(name, is_value=True))
        given = rows
        if isinstance(rows, Mapping) and not _is_split(rows):
            given = _rows_of_batch(rows, self.place)
        # an array or a tensor without dimensions has the methods of a sequence, and is none
        is_iterable = isinstance(given, Iterable) and not isinstance(given, bytes | str)
        if not _is_dataset(given) and (not is_iterable or getattr(given, "shape", None) == ()):
            expected = "a datasets.Dataset or DatasetDict, a path, mappings, a batch of lists or tensors, or batches"
            raise InputError(f"{name} of the type {type(rows).__name__}", expected=expected)
        self._rows = given
        # PyTorch's own collator makes a list of the tokens at each position of all rows
        self._is_transposed = getattr(getattr(rows, "collate_fn", None), "__name__", "") == "default_collate"
        self.is_repeatable: bool = not isinstance(given, Iterator) and not hasattr(given, "batch_sampler")

    def records(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[SourceRecord]:
        """Yield the records; see `RowSource.records`.

        Raises:
            InputError: If a row is no mapping, a value has a type that JSON lacks, or a dataset has no rows.
        """
        if _is_split(self._rows):
            for split, dataset in self._rows.items():
                yield from self._of_dataset(dataset, str(split))
        elif _is_dataset(self._rows):
            yield from self._of_dataset(self._rows)
        else:
            for number, row in enumerate(self._rows, start=1):
                place = Place(self.place.source, number)
                if not isinstance(row, Mapping):
                    raise InputError(f"a row is a {type(row).__name__}", place=place, expected="a mapping")
                if not _is_batch(row):
                    yield SourceRecord(place, _as_read(row, place))
                    continue
                if self._is_transposed and isinstance(row["input_ids"], list):
                    raise InputError(
                        "PyTorch's default_collate has put the tokens of all rows at one position together",
                        place=Place(self.place.source, split=number - 1) / "input_ids",
                        expected="rows as tensors, or a DataLoader with the collator of your trainer as collate_fn",
                    )
                for position, of_batch in enumerate(_rows_of_batch(row, place), start=1):
                    place = Place(self.place.source, position, split=number - 1)
                    yield SourceRecord(place, _as_read(of_batch, place))

    def _of_dataset(self, dataset: Any, split: str | None = None) -> Iterator[SourceRecord]:
        number = 0
        for table in dataset.with_format("arrow").iter(batch_size=_BATCH):
            refuse_two_columns(table.schema.names, self.place)
            for row in table.to_pylist():
                number += 1
                yield SourceRecord(Place(self.place.source, number, split=split), row, is_padded=True)
        if not number:
            raise InputError("the dataset has no rows", place=self.place, expected="encoded rows")


def rows_source(rows: Any, name: str = "rows") -> RowSource:
    """Return the source of a Python value, or of a path.

    Raises:
        InputError: As for `ValueRows`.
    """
    return FileRows(rows) if isinstance(rows, Path) else ValueRows(rows, name)


def first_records_of(rows: RowSource) -> list[SourceRecord]:
    """Return the first records of a source, by which its form is recognised."""
    return list(islice(rows.records(), LOOKED_AT))


def _is_dataset(value: Any) -> bool:
    # by its methods: `datasets` is not imported here, and a streamed dataset has another class
    return hasattr(value, "with_format") and hasattr(value, "iter")


def _is_batch(row: Mapping[str, Any]) -> bool:
    """Return whether a mapping holds the ids of several rows, as what a `DataLoader` yields."""
    ids = row.get("input_ids")
    if isinstance(ids, list | tuple):
        return bool(ids) and (isinstance(ids[0], list | tuple) or len(getattr(ids[0], "shape", ())) > 0)
    return len(getattr(ids, "shape", ())) > 1


def _is_split(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(map(_is_dataset, value.values()))


def _as_read(row: Mapping[str, Any], place: Place) -> Any:
    """Return a record as the line of a JSON file would be read, or the error with which the line would be refused.

    Raises:
        InputError: If a value has a type that JSON lacks.
    """
    try:
        plain = _plain(row, place)
        text = json.dumps(plain)
    except TypeError as error:
        raise InputError(str(error), place=place, expected="plain data or tensors") from error
    except RecursionError as error:
        raise InputError(_ENDLESS, place=place, expected="plain data or tensors") from error
    except ValueError:  # Python writes no number that it would not read
        characters = next(filter(None, map(_refused_length, _numbers(plain))))
        return RowError(f"a number has {characters} characters, which is too many to read", place=place)
    if len(text) > limits.MAX_ROW_BYTES:
        # a file may have its texts without escapes
        size = len(json.dumps(plain, ensure_ascii=False).encode(errors="surrogatepass"))
        if size > limits.MAX_ROW_BYTES:
            return limits.row_too_large(size, place)
    try:
        return loads_strict(text)
    except ValueError as error:
        return RowError(str(error), place=place, next_step=json_step(str(error)))


def _rows_of_batch(batch: Mapping[str, Any], place: Place) -> list[dict[str, Any]]:
    """Return the rows of a batch: each value of the batch has one entry for each row.

    Raises:
        InputError: If the batch has no ids.
    """
    try:
        data = _plain(batch, place)
    except RecursionError as error:
        raise InputError(_ENDLESS, place=place, expected="plain data or tensors") from error
    ids = data.get("input_ids")
    if not isinstance(ids, list) or not ids:
        expected = "input_ids of shape (batch, length), labels and messages"
        raise InputError("a batch without input_ids", place=place, expected=expected)
    if not isinstance(ids[0], list):  # one row
        return [data]
    columns = {name: values for name, values in data.items() if isinstance(values, list) and len(values) == len(ids)}
    return [{name: values[number] for name, values in columns.items()} for number in range(len(ids))]


def _numbers(value: Any) -> Iterator[int]:
    """Yield the integers of plain data in the order in which they are written."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _refused_length(number: int) -> int:
    """Return the number of characters of an integer that Python does not write; 0 if it does."""
    try:
        str(number)
    except ValueError:
        return len(str(Decimal(number)))
    return 0


def _plain(value: Any, place: Place) -> Any:
    """Return a value with its arrays and tensors as lists, at any depth.

    Keys are written by `json.dumps`: the key 1 becomes "1", and True becomes "true".

    Raises:
        InputError: If a tensor has no values, as on the device `meta`.
    """
    if isinstance(value, Mapping):
        return {_key(key): _plain(item, place) for key, item in value.items()}
    if hasattr(value, "tolist"):
        try:
            listed = value.tolist()
        except NotImplementedError as error:
            raise InputError(one_line(error), place=place, expected="tensors with values") from error
        # the items of an array of objects may be arrays
        return _plain(listed, place) if str(getattr(value, "dtype", "")) == "object" else listed
    return [_plain(item, place) for item in value] if isinstance(value, list | tuple) else value


def _key(key: Any) -> Any:
    """Return a key that `json.dumps` takes: a number of an array as a number, and anything else as text."""
    key = key.tolist() if hasattr(key, "tolist") else key
    return key if isinstance(key, str | int | float | None) else str(key)
