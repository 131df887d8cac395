"""Rows from other formats: recognise, convert, report.

The formats are those of `chat.formats`; the judge of every converted row is `chat.rows.parse_row`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from pytest_mistral_lora.chat.fields import ROW_KEYS, kind_of
from pytest_mistral_lora.chat.formats import FORMATS, MESSAGE_LISTS, recognise, unread_columns
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.reading.chunks import DataFile, bar, total_bytes
from pytest_mistral_lora.chat.remedies import DATA_SUFFIXES
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.data.containers import Record, SourceFile, open_source
from pytest_mistral_lora.data.converter import RecordConverter
from pytest_mistral_lora.data.layouts import Layout
from pytest_mistral_lora.data.report import LOSSES, Report, RowChanges, refuse_unknown_losses
from pytest_mistral_lora.errors import InputError, RowError, and_more, one_line
from pytest_mistral_lora.records.files import finished_file, inside, remove_temporaries

_LOOKED_AT = 20
_STATE = "state.json"
"""The file that lists the data files in a folder of `Dataset.save_to_disk`."""
_SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<of>\d{5})\..+")


class Source(NamedTuple):
    """A file to import.

    Attributes:
        path: The file.
        layout: Its layout, as far as it is declared.
    """

    path: Path
    layout: Layout = Layout()


def source_files(path: Path, split: str = "") -> list[Path]:
    """Return the data files of a path: itself, or those of a folder in order.

    Args:
        path: The file or folder.
        split: Of a folder with several splits, the one to take, by the names of its files; empty for none.

    Raises:
        InputError: If there are none, a folder has several splits or kinds of files, or the split is not there.
    """
    if not path.exists():
        # `owner/name` may be a data set of the Hub
        is_name = len(path.parts) == 2 and not path.is_absolute() and not path.suffix
        step = f"From the Hub: hf download --repo-type dataset {path} --local-dir data" if is_name else ""
        raise InputError("no such file or folder", place=str(path), next_step=step)
    if not path.is_dir():
        if split not in ("", "train"):
            raise InputError(f"split {split}: a file alone has none", place=str(path), expected="the split's own file")
        return [path]
    if (path / _STATE).is_file():
        return _saved_files(path)
    kind, found = ("splits", splits) if (splits := saved_splits(path)) else ("data files", _loose_files(path))
    if split:
        named = [one for one in found if re.match(rf"{re.escape(split)}([-_.]|$)", one.name)]
        if not named and split != "train":  # files without the name of a split are the split `train`
            expected = ", ".join(one.name for one in found[:8])
            raise InputError(f"no file of the split {split!r}", place=str(path), expected=expected)
        found = named or found
    if not found:
        raise InputError("has no data files", place=str(path), expected=", ".join(DATA_SUFFIXES))
    if _are_shards(found):
        return found
    if len(found) > 1:
        names = ", ".join(one.relative_to(path).as_posix() for one in found[:8])
        raise InputError(
            f"has {len(found)} {kind}: {names}", place=str(path), next_step="Name those to import, in their order."
        )
    return source_files(found[0])


def every_file(path: Path) -> list[Path]:
    """Return all data files of a path, in order: itself, or those of a folder, of every split and kind.

    Raises:
        InputError: If a folder of `save_to_disk` is damaged.
    """
    if not path.is_dir():
        return [path]
    if (path / _STATE).is_file():
        return _saved_files(path)
    splits = saved_splits(path)
    return [file for split in splits for file in _saved_files(split)] if splits else _loose_files(path)


def saved_splits(path: Path) -> list[Path]:
    """Return the folders of the splits in a folder of `DatasetDict.save_to_disk`; none of another folder.

    Raises:
        InputError: If it is damaged.
    """
    file = path / "dataset_dict.json"
    if not file.is_file():
        return []
    names = [Path(str(split)).name for split in _listed(file, "splits")]
    if "" in names:
        raise InputError("a split without a name", place=str(file), expected="the name of a folder beside it")
    return [path / name for name in names]


def _saved_files(path: Path) -> list[Path]:
    """Return the data files of a folder of `Dataset.save_to_disk`."""
    listed = _listed(path / _STATE, "_data_files")
    # `inside` refuses a name that leads out of the folder
    return [inside(path, str(one.get("filename") if isinstance(one, Mapping) else one)) for one in listed]


def _loose_files(path: Path) -> list[Path]:
    """Return the data files below a folder."""
    found = sorted(one for one in path.rglob("*") if one.is_file() and one.name.lower().endswith(DATA_SUFFIXES))
    # hidden ones are caches, of the Hub's client and of file managers
    found = [one for one in found if not any(part.startswith(".") for part in one.relative_to(path).parts)]
    return [one for one in found if one.name not in ("dataset_info.json", "dataset_infos.json", _STATE)]


def _are_shards(found: Sequence[Path]) -> bool:
    """Return whether sorted files are the shards of one table, `train-00000-of-00002.parquet`, and all are there."""
    matches = [_SHARD.fullmatch(path.name) for path in found]
    names = {(path.parent, match and match["name"]) for path, match in zip(found, matches, strict=True)}
    numbers = [(int(match["number"]), int(match["of"])) for match in matches if match]
    return len(names) == 1 and numbers == [(number, len(found)) for number in range(len(found))]


def _listed(path: Path, key: str) -> list[Any]:
    data = read_json(path)
    listed = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(listed, list):
        raise InputError(f"no list under {key!r}", place=str(path), expected="a folder of save_to_disk")
    return listed


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
        remarks: Sentences for the report, of settings that are no part of rows.
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
        report: Is filled while the rows are read.
        lossy: Kinds of `LOSSES` that are allowed.
        progress: Called with the number of bytes read since the last call.

    Raises:
        InputError: If a file cannot be read, has no records, or is in no known format.
    """
    for source in sources:
        for one in conversions(source, report, lossy=lossy, progress=progress):
            if isinstance(one, Conversion):
                yield one.data


class Conversion(NamedTuple):
    """A record that is converted.

    Attributes:
        record: The record, with its place in the source.
        data: The row as plain data, with the user's own keys.
        row: The row.
    """

    record: Record
    data: dict[str, Any]
    row: Row


def conversions(
    source: Source,
    report: Report,
    *,
    lossy: Collection[str] = (),
    progress: Callable[[int], None] = lambda read: None,
) -> Iterator[Conversion | RowError]:
    """Yield the row of each record of a file, or the error of one that cannot be converted.

    A record that is left out by an allowed loss gives neither: it is counted in the report.

    Args:
        source: The file.
        report: Is filled while the records are read.
        lossy: Kinds of `LOSSES` that are allowed.
        progress: Called with the number of bytes read since the last call.

    Raises:
        InputError: If the file cannot be read, has no records, or is in no known format.
    """
    file = open_source(source.path)
    records = file.records(progress)
    first = list(islice(records, _LOOKED_AT))
    if not first:
        raise InputError("the file has no rows", place=str(source.path))
    layout, evidence = layout_of(source, first)
    report.sources.append({"file": str(source.path), "container": file.title, "format": evidence})
    report.layouts.append(layout)
    # declared keys under a name of their own, until a record has them
    unseen = {key for name, key in source.layout.keys.items() if key and key != name}
    for record in chain(first, records):
        if unseen and isinstance(record.value, Mapping):
            unseen -= record.value.keys()
        found = _converted(record, layout, file, report, lossy)
        if found is not None:
            yield found
    report.remarks += [f"no record of {source.path} has the declared key {key!r}" for key in sorted(unseen)]


def layout_of(source: Source, first: Sequence[Record]) -> tuple[Layout, str]:
    """Return the layout of a file by its first records, and its evidence in words."""
    readable = [record.value for record in first if not isinstance(record.value, RowError)]
    recognised = next(filter(None, map(recognise, readable)), None)
    if source.layout.format:
        keys = readable[0].keys() if readable and isinstance(readable[0], Mapping) else set()
        if recognised is not None and not recognised.name and keys.isdisjoint(source.layout.keys.values()):
            raise InputError(f"this is {recognised.title}", place=first[0].place, next_step=recognised.advice)
        return source.layout, f"{FORMATS[source.layout.format]} (declared)"
    if recognised is None:
        if not readable:
            raise first[0].value
        record = readable[0] if isinstance(readable[0], Mapping) else {}
        lists = [key for key, value in record.items() if isinstance(value, list)]
        # a known key, whose value is the fault
        known = next((key for key in MESSAGE_LISTS if record.get(key) is not None), "")
        if known:
            return Layout("messages", {"messages": known}), f"{FORMATS['messages']} (`{known}`)"
        kind = "an empty object" if readable[0] == {} else kind_of(readable[0])
        named = ", ".join(one_line(key, 60) for key in islice(record, 20)) + and_more(20, len(record))
        shown = f"keys {named}" if record else f"the first record is {kind}"
        found = f"no known format: {shown}"
        step = "Name it with --format, or declare its keys as Axolotl or LLaMA-Factory do."
        if len(lists) == len(record) == 1:
            key, file = shlex.quote(f".{json.dumps(lists[0])}"), shlex.quote(str(source.path))
            step = f"If its rows are the list under {lists[0]!r}, import that list: jq {key} {file} > list.json"
        raise InputError(found, place=first[0].place, expected=f"one of {', '.join(FORMATS)}", next_step=step)
    if not recognised.name:
        step = recognised.next_step(str(source.path))
        raise InputError(f"this is {recognised.title}", place=first[0].place, next_step=step)
    return Layout(recognised.name), recognised.title


def _converted(
    record: Record, layout: Layout, file: SourceFile, report: Report, lossy: Collection[str]
) -> Conversion | RowError | None:
    """Return the conversion of a record or its error, or None if it is left out; the report counts each."""
    noted = RowChanges()
    row = None
    try:
        if isinstance(record.value, RowError):
            raise record.value
        data = RecordConverter(record, layout, noted, file.padded).row()
        losses = sorted(noted.losses.keys() - set(lossy))
        # a row that lost too much is refused for that, not for the fields that are left
        if data is not None and not losses:
            row = parse_row(data, place=record.place)
    except RowError as error:
        allowed = "bad-records" in lossy
        report.refuse(error, allowed=allowed)
        return None if allowed else error
    report.take(noted, record.place)
    if losses:
        report.bad += 1
        lost = "; ".join(LOSSES[kind] for kind in losses)
        step = f"Allow the loss: `lossy: [{', '.join(losses)}]` of the source in the recipe, or --lossy of the import."
        return RowError(f"a row cannot keep {lost}", place=record.place, next_step=step)
    if own := dict.fromkeys(key for key in data or () if key not in ROW_KEYS):
        report.own.add(record.place, own)
        report.unread.update(filter(None, [unread_columns(data)]))
    report.rows += data is not None
    report.dropped += data is None
    return None if data is None or row is None else Conversion(record, data, row)
