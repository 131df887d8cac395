"""Open data in any format as files of rows: for training, for checks and for statistics, in one way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.kinds.records import shown_kind
from pytest_mistral_lora.chat.reading import first_values
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.chat.reading.row_source import RowSource
from pytest_mistral_lora.chat.row_files import scan_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.formats.convert import Conversion, Source, conversions
from pytest_mistral_lora.formats.declarations import declared_sources
from pytest_mistral_lora.formats.importers import may_declare
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.recognition import FORMATS, recognise
from pytest_mistral_lora.formats.report import Report, refuse_unknown_losses
from pytest_mistral_lora.formats.row_sources import first_records_of
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.files import framed_row


def open_rows(
    path: Path,
    *,
    layout: Layout | None = None,
    names: Collection[str] = (),
    lossy: Collection[str] = (),
    is_held_out: bool = False,
) -> list[DataFile]:
    """Return the data files of a path; each is converted to rows while it is read.

    `chat.row_files.scan_rows` yields the rows of each, and `chat.reading.chunks.chunks` their lines: a record at a
    time, with its place in the source.

    Args:
        path: A data file, a folder, or the configuration of a trainer that declares rows.
        layout: The format and the places of its fields in the records, or None to recognise them.
        names: Data sets to take of those that the configuration declares by name; empty for all that it trains on.
        lossy: Kinds of `LOSSES` that are allowed.
        is_held_out: Whether all rows are held out.

    Raises:
        InputError: If a file is missing, a declaration is not supported, or a name is unknown.
    """
    refuse_unknown_losses(lossy)
    sources, _ = sources_of(path, layout or Layout(), names)
    return [DataFile(source.path, is_held_out, ConvertedSource(source, lossy)) for source in sources]


def rows_of(path: Path, **options: Any) -> Iterator[Row | RowError]:
    """Yield each row of the data files of a path, or the error of its record, one at a time.

    Args:
        path: As for `open_rows`.
        options: The other arguments of `open_rows`.

    Raises:
        InputError: As for `open_rows`; and if a file cannot be read.
    """
    for file in open_rows(path, **options):
        yield from scan_rows(file)


def sources_of(path: Path, layout: Layout, names: Collection[str] = ()) -> tuple[list[Source], list[str]]:
    """Return the files of a path, with their layouts, and remarks on ignored settings.

    Raises:
        InputError: If a file is missing, a declaration is not supported, or it and `layout` both name a format.
    """
    found, remarks = declared_sources(path, names)
    if not layout.format:
        return found, remarks
    if any(source.layout.format for source in found):
        raise InputError(f"{path} declares its format", place="format", expected="none beside it")
    return [Source(source.path, layout) for source in found], remarks


class ConvertedSource:
    """A file that is converted to rows while it is read.

    Attributes:
        source: The file and its layout.
        lossy: Kinds of losses that are allowed.
        report: The report of the last pass; empty before the first.
        bytes_read: Bytes of the file that the last pass has read so far.
        place: The place of the record that was yielded last; empty before the first.
        rows_sha256: Hash of all rows, as in `records.files.sha256_rows`, from the last complete pass.
    """

    def __init__(self, source: Source, lossy: Collection[str] = ()) -> None:
        self.source: Source = source
        self.lossy: tuple[str, ...] = tuple(lossy)
        self.report: Report = Report()
        self.bytes_read: int = 0
        self.place: Place = NOWHERE
        self.rows_sha256: str = ""

    def lines(self) -> Iterator[tuple[int, bytes | RowError]]:
        """Yield the number of each record, and its row as a line or its error; see `LineSource`.

        Raises:
            InputError: If the file cannot be read, has no records or yields no row, or its format is unknown.
        """
        self.report, self.bytes_read = Report(), 0
        name = self.source.layout.format
        if name and name not in FORMATS:
            # a manifest of a later version may name another format
            raise InputError(f"format {name!r}", place=str(self.source.path), expected=f"one of {', '.join(FORMATS)}")
        digest = hashlib.sha256()
        for result in conversions(self.source, self.report, lossy=self.lossy, progress=self._count):
            place = result.record.place if isinstance(result, Conversion) else result.place
            self.place, number = place.row, place.record or 0
            if isinstance(result, RowError):
                yield number, result
            else:
                for row in result.rows:
                    digest.update(framed_row(row))
                yield number, result.line()
        self.rows_sha256 = digest.hexdigest()
        if not (self.report.rows or self.report.bad):
            raise InputError(f"each of {self.report.dropped} records is left out", place=str(self.source.path))

    def _count(self, read: int) -> None:
        self.bytes_read += read

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide the rows: format, layout and allowed losses."""
        layout = self.source.layout
        return {"format": layout.format, "layout": layout.to_json(), "lossy": sorted(self.lossy)}

    def facts(self) -> dict[str, Any]:
        """Return the facts of a pass for `source` in a manifest: format, layout, losses and hash of the rows."""
        [layout] = self.report.layouts
        losses = {kind: tally.count for kind, tally in sorted(self.report.losses.items())}
        return {
            "format": layout.format,
            "container": self.report.sources[0]["container"],
            "rows_sha256": self.rows_sha256,
            "lossy": sorted(self.lossy),
            "losses": losses,
            "left_out": self.report.dropped,
            "layout": layout.to_json(),
        }


def recorded_file(path: Path, entry: Mapping[str, Any]) -> DataFile:
    """Return a data file, to read as for the recorded run.

    Args:
        path: The file.
        entry: Its entry in the manifest's `dataset`.
    """
    source = entry.get("source")
    if source is None:
        return DataFile(path)
    layout = Layout.from_json(source["format"], source["layout"])
    return DataFile(path, source=ConvertedSource(Source(path, layout), source["lossy"]))


def row_files(path: Path) -> list[DataFile]:
    """Return the files of a path of rows; files of another format with their conversion.

    Raises:
        InputError: If no file is found, or a folder has files of different kinds.
    """
    if path.is_dir() or may_declare(path):
        return open_rows(path)
    try:
        records = first_values(path)
    except InputError as error:
        # not JSON Lines, so it is converted; or missing, which the pass reports
        return open_rows(path) if error.next_step else [DataFile(path)]
    for record in records:
        found = recognise(record)
        if found is not None:
            return open_rows(path) if found.name and not is_row(record) else [DataFile(path)]
    # a file without a readable line is judged unconverted: each line is a finding
    return [DataFile(path)]


def held_file(rows: RowSource) -> DataFile:
    """Return rows in memory as a data file; those of another format, or of a table, with their conversion.

    Args:
        rows: The rows, which can be read twice.
    """
    path, records = Path(rows.place.source.name), first_records_of(rows)
    known = next((record.value for record in records if recognise(record.value) is not None), None)
    converts = any(record.is_padded for record in records) or (known is not None and not is_row(known))
    reader = ConvertedSource(Source(path, held=rows)) if converts else HeldLines(rows)
    return DataFile(path, source=reader, is_value=True)


class HeldLines:
    """Rows in memory as the lines of a JSONL file: see `LineSource`.

    Attributes:
        bytes_read: 0: there is no file.
        place: The place of the row that was yielded last; empty before the first.
        identity: Empty: no setting decides the rows.
    """

    def __init__(self, rows: RowSource) -> None:
        self._rows = rows
        self.bytes_read: int = 0
        self.place: Place = NOWHERE
        self.identity: Mapping[str, Any] = {}

    def lines(self) -> Iterator[tuple[int, bytes | RowError]]:
        """Yield the number of each row, and the row as a line or its error."""
        for number, record in enumerate(self._rows.records(), start=1):
            self.place = record.place
            value = record.value
            yield number, value if isinstance(value, RowError) else json.dumps(value).encode()

    def facts(self) -> dict[str, Any]:
        """Return nothing: the rows are not converted."""
        return {}


def is_row(record: Any) -> bool:
    """Return whether a record is a row of some kind already, with nothing to convert."""
    found = recognise(record)
    return shown_kind(record) is not None or (found is not None and found.is_row)
