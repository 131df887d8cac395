"""Convert files of other formats to rows: each record becomes a row, or an error with its place.

The judge of every converted row is its kind.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pytest_mistral_lora.chat.fields import check_text, kind_of
from pytest_mistral_lora.chat.kinds.records import record_kind
from pytest_mistral_lora.chat.reading.chunks import DataFile, bar, total_bytes
from pytest_mistral_lora.chat.reading.row_source import RowSource
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, RowError, UncheckedRowError, and_more, one_line
from pytest_mistral_lora.formats.containers import Record, SourceFile, open_source
from pytest_mistral_lora.formats.conversation import MESSAGE_LISTS
from pytest_mistral_lora.formats.converter import convert_record
from pytest_mistral_lora.formats.declared_keys import DECLARED_KEYS, MarkColumns
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.recognition import FORMATS, recognise, unread_columns
from pytest_mistral_lora.formats.records import LOOKED_AT
from pytest_mistral_lora.formats.report import LOSSES, Report, refuse_unknown_losses
from pytest_mistral_lora.formats.row_sources import first_records_of
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import finished_file, remove_temporaries

_SHOWN_KEYS = 8
_MOST_BAD = 100_000
"""A file whose first records, so many, are all bad is refused: a packed file of 50 kB can have millions of them."""


class Source(NamedTuple):
    """A file to import.

    Attributes:
        path: The file.
        layout: The declared part of its layout.
        held: The records, if they are a value of Python, which `path` names.
    """

    path: Path
    layout: Layout = Layout()
    held: RowSource | None = None

    def open(self) -> SourceFile:
        """Return the records.

        Raises:
            InputError: As for `open_source`.
        """
        if self.held is None:
            return open_source(self.path)
        held, padded = self.held, any(record.is_padded for record in first_records_of(self.held))

        def records(progress: Callable[[int], None]) -> Iterator[Record]:
            yield from (Record(record.place, record.value) for record in held.records(progress))

        return SourceFile("rows in memory", padded, records, records)


def import_rows(
    sources: Sequence[Source],
    to: Path,
    *,
    lossy: Collection[str] = (),
    remarks: Sequence[str] = (),
    progress: TextIO | None = None,
) -> Report:
    """Convert files to one JSONL file of rows, written only if every record can be converted.

    Args:
        sources: The files, in order.
        to: The file to write.
        lossy: Kinds of `LOSSES` that are allowed.
        remarks: Sentences for the report, about settings that are not part of rows.
        progress: A terminal for a progress bar; None for none.

    Raises:
        InputError: If `to` exists, a file cannot be read, or a record cannot be converted; all are counted.
    """
    if to.exists():
        raise InputError("exists already", place=str(to), next_step="Remove it or name another file.")
    refuse_unknown_losses(lossy)
    report = Report(remarks=list(remarks))
    files = [DataFile(source.path, False) for source in sources]
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        remove_temporaries(to)
        with bar(progress, total_bytes(files), "import") as advance, finished_file(to) as file:
            for row in convert(sources, report, lossy=lossy, progress=advance):
                file.write(f"{json.dumps(row, ensure_ascii=False)}\n".encode())
            _refuse_bad(report, lossy)
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", place=str(to)) from error
    return report


def _refuse_bad(report: Report, lossy: Collection[str]) -> None:
    if not report.bad:
        return
    lines = [f"{report.bad} of {report.bad + report.rows + report.dropped} records cannot be converted"]
    for kind, tally in sorted(report.losses.items()):
        if kind not in lossy:
            lost = LOSSES[kind] + (" ({detail})" if tally.details else "")
            lines.append(f"  {tally.text(lost)}. To leave that out, add --lossy {kind}")
    lines += [f"  {line}" for line in report.fault_lines()]
    if report.refused:
        lines.append("  To leave these records out, add --lossy bad-records")
    raise InputError("\n".join([*lines, "  Nothing was written"]))


def convert(
    sources: Sequence[Source],
    report: Report,
    *,
    lossy: Collection[str] = (),
    progress: Callable[[int], None] = lambda read: None,
) -> Iterator[dict[str, Any]]:
    """Yield the rows of some files as plain data, one at a time; records that cannot be converted are in the report.

    Args:
        sources: The files, in order.
        report: The report to fill while the rows are read.
        lossy: Kinds of `LOSSES` that are allowed.
        progress: Called with the number of bytes read since the last call.

    Raises:
        InputError: If a file cannot be read, has no records, or its format is not known.
    """
    for source in sources:
        for item in conversions(source, report, lossy=lossy, progress=progress):
            if isinstance(item, Conversion):
                yield item.data


class Conversion(NamedTuple):
    """A converted record.

    Attributes:
        record: The record, with its place in the source.
        data: The record of a row as plain data, with the user's own keys.
        rows: The rows that it stands for.
    """

    record: Record
    data: dict[str, Any]
    rows: tuple[Row, ...]

    def line(self) -> bytes:
        """Return the record of the row as a line, without the user's own keys that declare nothing."""
        keys = dict.fromkeys((*record_kind(self.data).keys, *DECLARED_KEYS))
        return json.dumps({key: self.data[key] for key in keys if key in self.data}, ensure_ascii=False).encode()


def conversions(
    source: Source,
    report: Report,
    *,
    lossy: Collection[str] = (),
    progress: Callable[[int], None] = lambda read: None,
) -> Iterator[Conversion | RowError]:
    """Yield the row of each record of a file, or the error of a record that cannot be converted.

    A record that an allowed loss leaves out yields neither: the report counts it.

    Args:
        source: The file.
        report: The report to fill while the records are read.
        lossy: Kinds of `LOSSES` that are allowed.
        progress: Called with the number of bytes read since the last call.

    Raises:
        InputError: If the file cannot be read, has no records, its format is not known, or its first `_MOST_BAD`
            records are all bad.
    """
    file = source.open()
    records = file.records(progress)
    first = list(islice(records, LOOKED_AT))
    if not first:
        raise InputError("the file has no rows", place=str(source.path))
    layout, evidence = layout_of(source, first)
    report.sources.append({"file": str(source.path), "container": file.title, "format": evidence})
    report.layouts.append(layout)
    # declared keys under their own names, until a record has them
    unseen = {key for name, key in source.layout.keys.items() if key and key != name}
    refused = report.refused
    columns = MarkColumns(lambda: (each.value for each in source.open().records(lambda read: None)))
    for number, record in enumerate(chain(first, records), start=1):
        if unseen and isinstance(record.value, Mapping):
            unseen -= record.value.keys()
        found = _converted(record, layout, columns, file, report, lossy)
        if found is not None:
            yield found
        if number == _MOST_BAD and report.refused - refused == number:
            raise InputError(
                "\n  ".join([f"none of its first {number:,} records can be converted", *report.fault_lines()]),
                place=str(source.path),
                next_step="If they have another format, name it with --format, or declare their keys.",
            )
    report.remarks += [
        f"`{key}` changes no token and no loss: its rows are trained on like all others"
        for key in report.own_keys.details
        if key in DECLARED_KEYS
    ]
    if layout.exchanged:
        report.remarks.append(f"the declaration of {source.path} reads {layout.exchanged}")
    report.remarks += [f"no record of {source.path} has the declared key {key!r}" for key in sorted(unseen)]


def layout_of(source: Source, first: Sequence[Record]) -> tuple[Layout, str]:
    """Return the layout of a file by its first records, and its evidence in words."""
    readable = [record.value for record in first if not isinstance(record.value, RowError)]
    recognised = next(filter(None, map(recognise, readable)), None)
    if source.layout.format:
        keys = readable[0].keys() if readable and isinstance(readable[0], Mapping) else set()
        if recognised is not None and not recognised.name and keys.isdisjoint(source.layout.keys.values()):
            raise InputError(f"this is {recognised.title}", place=first[0].place, next_step=recognised.advice)
        return source.layout, f"{FORMATS[source.layout.format].title} (declared)"
    if recognised is None:
        if not readable:
            raise first[0].value
        record = readable[0] if isinstance(readable[0], Mapping) else {}
        lists = [key for key, value in record.items() if isinstance(value, list)]
        # a known key with a faulty value
        known = next((key for key in MESSAGE_LISTS if record.get(key) is not None), "")
        if known:
            return Layout("messages", {"messages": known}), f"{FORMATS['messages'].title} (`{known}`)"
        kind = "an empty object" if readable[0] == {} else kind_of(readable[0])
        named = ", ".join(one_line(key, 60) for key in islice(record, _SHOWN_KEYS)) + and_more(_SHOWN_KEYS, len(record))
        shown = f"keys {named}" if record else f"the first record is {kind}"
        found = f"no known format: {shown}"
        step = (
            "Name it with --format, or declare its keys: in the `layout` of a recipe's source, or in your trainer's "
            "configuration."
        )
        if len(lists) == len(record) == 1 and all(isinstance(item, Mapping) for item in record[lists[0]]):
            key, file = shlex.quote(f".{json.dumps(lists[0])}"), shlex.quote(str(source.path))
            step = f"If its rows are the list under {lists[0]!r}, import that list: jq {key} {file} > list.json"
        raise InputError(found, place=first[0].place, expected=f"one of {', '.join(FORMATS)}", next_step=step)
    if not recognised.name:
        step = recognised.next_step(str(source.path))
        raise InputError(f"this is {recognised.title}", place=first[0].place, next_step=step)
    return Layout(recognised.name), recognised.title


def _refuse_unwritable_columns(data: Mapping[str, Any], place: Place) -> None:
    """Refuse an extra column that cannot be written to a file: `parse_rows` does not read it.

    Raises:
        RowError: If its name or its value has half a surrogate pair.
    """
    keys = record_kind(data).keys
    for key, value in data.items():
        if key not in keys:
            check_text(key, place / ("column " + json.dumps(key)))
            check_text(json.dumps(value, ensure_ascii=False), place / key)


def _converted(
    record: Record, layout: Layout, columns: MarkColumns, file: SourceFile, report: Report, lossy: Collection[str]
) -> Conversion | RowError | None:
    """Return the conversion of a record or its error, or None if it is left out; the report counts each."""
    rows: tuple[Row, ...] | None = None
    try:
        if isinstance(record.value, RowError):
            raise record.value
        data, changes = convert_record(record, layout, columns, padded=file.padded, lossy=lossy)
        losses = sorted({change.kind for change in changes if change.is_loss} - set(lossy))
        # a row that lost too much is refused for the loss, not for its remaining fields
        if data is not None and not losses:
            # what is written has our form
            try:
                rows = record_kind(data).parse(data, record.place)
            except UncheckedRowError:
                # it has our form, and who judges it says what is not known
                rows = ()
            _refuse_unwritable_columns(data, record.place)
    except RowError as error:
        allowed = "bad-records" in lossy
        report.refuse(error, allowed=allowed)
        return None if allowed else error
    report.take(changes, record.place)
    if losses:
        report.bad += 1
        lost = "; ".join(LOSSES[kind] for kind in losses)
        step = f"Allow the loss: `lossy: [{', '.join(losses)}]` of the source in the recipe, or --lossy of the import."
        return RowError(f"a row cannot keep {lost}", place=record.place, next_step=step)
    user_keys = dict.fromkeys(key for key in data or () if key not in record_kind(data).keys)
    if user_keys:
        report.own_keys.add(record.place, user_keys)
        report.unread.update(filter(None, [unread_columns(data)]))
    report.rows += data is not None
    report.dropped += data is None
    return None if data is None or rows is None else Conversion(record, data, rows)
