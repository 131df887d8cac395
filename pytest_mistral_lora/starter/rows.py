"""Look at the data of a new recipe: its format, its rows, its faults, and a few rows to record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pytest_mistral_lora.chat.formats import FORMATS
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.chat.rows import Row, parse_row, scan_rows
from pytest_mistral_lora.errors import InputError, RowError

ROWS = "rows.jsonl"
"""The file that a recipe reads if the user names none."""

_PLAIN = "rows (JSON Lines, `messages` with role/content)"
_SHOWN = 5
_MOST_SAMPLES = 5
_ENOUGH_SAMPLES = 3
_DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".jsonl.gz", ".jsonl.zst")


@dataclass(frozen=True)
class SeenRows:
    """A path with data, after one pass over it.

    Attributes:
        name: The path as the recipe names it.
        title: Its format, for people.
        format: The format to declare in the recipe; empty for rows as they are, or data that declares its own.
        converted: Whether its rows are converted while they are read.
        count: Number of good rows.
        bad: Number of rows or records that cannot be used.
        errors: The first of their errors.
        samples: A few rows: the first of each shape, and others if there are few shapes.
    """

    name: str
    title: str
    format: str
    converted: bool
    count: int
    bad: int
    errors: tuple[RowError, ...]
    samples: tuple[Row, ...]

    @property
    def entry(self) -> str:
        """Its entry under `data.train`, as YAML."""
        if not self.converted:
            return self.name
        return f"{{path: {self.name}, format: {self.format}}}" if self.format else f"{{path: {self.name}}}"


def path_in_recipe(path: Path, folder: Path) -> str:
    """Return a path as a recipe in a folder names it, quoted if YAML needs it."""
    text = str(path)
    if not path.is_absolute() or path.is_relative_to(folder.resolve()):
        text = Path(os.path.relpath(path.absolute(), folder.resolve())).as_posix()
    return yaml_text(text)


def yaml_text(text: str) -> str:
    """Return a text as YAML, in quotes if it needs them, within braces, too."""
    return str(yaml.safe_dump([text], allow_unicode=True, width=10_000, default_flow_style=True)).strip()[1:-1]


def look_at(path: Path, folder: Path) -> SeenRows:
    """Read all rows of a path once.

    Args:
        path: A data file, a folder, or a configuration that declares data.
        folder: The folder of the recipe.

    Raises:
        InputError: If it is not there, is no data, is in no format that is known, or has no row that can be used.
    """
    from pytest_mistral_lora.conformance.path_kinds import recognised, row_files

    declares = path.suffix.lower() in (".yaml", ".yml") or "dataset_info" in path.name
    title = "data that it declares"
    if not declares or not path.exists():
        found = recognised(path)
        if found.kind != "rows":
            raise InputError(f"this is {found.title}", place=str(path), expected="rows: chat JSONL, or another format")
        title = found.title
    seen = seen_rows(path_in_recipe(path, folder), title, row_files(path), declares=declares)
    if not seen.count:
        reasons = "".join(f"\n  {error}" for error in seen.errors)
        raise InputError(f"no record is a row that can be used{reasons}", place=str(path))
    return seen


def seen_rows(name: str, title: str, files: Iterable[DataFile], *, declares: bool = False) -> SeenRows:
    """Read all rows of data files once.

    Raises:
        InputError: If a file cannot be read.
    """
    count, bad, format_name, converted = 0, 0, "", False
    errors: list[RowError] = []
    samples: dict[tuple[Any, ...], Row] = {}
    firsts: list[Row] = []
    for file in files:
        for row in scan_rows(file):
            if isinstance(row, RowError):
                bad += 1
                errors += [row] if bad <= _SHOWN else []
            else:
                count += 1
                samples.setdefault(_shape(row), row)
                firsts += [row] if count <= _ENOUGH_SAMPLES else []
        if file.source is not None:
            converted = True
            format_name = "" if declares else _format_of(file.source)
    # rows of one shape still have their own words: a few are better than one
    kept = {row.canonical(): row for row in (*samples.values(), *firsts)}
    chosen = tuple(kept.values())[: max(len(samples), _ENOUGH_SAMPLES)][:_MOST_SAMPLES]
    return SeenRows(name, title, format_name, converted, count, bad, tuple(errors), chosen)


def _format_of(source: Any) -> str:
    layouts = source.report.layouts
    # a format whose keys are the user's own is recognised again by its records
    return layouts[0].format if layouts and layouts[0].format in FORMATS and not layouts[0].keys else ""


def _shape(row: Row) -> tuple[Any, ...]:
    """Return the traits of a row that decide how it is rendered: who speaks, tools, thinking, and its scripts."""
    roles = {message["role"] for message in row.messages}
    text = "".join(str(message.get("content")) for message in row.messages)
    keys = {key for message in row.messages for key in message} - {"role", "content"}
    return len(row.messages) > 2, frozenset(roles), frozenset(keys), bool(row.tools), text.isascii(), "\n" in text


def example_text() -> str:
    """Return the file of rows that a repository without data begins with."""
    return (Path(__file__).parent / "texts" / "example_rows.jsonl").read_text(encoding="utf-8")


def example_rows() -> SeenRows:
    """Return the rows of `example_text`, as `look_at` sees them in a file."""
    rows = tuple(parse_row(json.loads(line)) for line in example_text().splitlines())
    return SeenRows(ROWS, _PLAIN, "", converted=False, count=len(rows), bad=0, errors=(), samples=rows[:_MOST_SAMPLES])


def data_files_in(folder: Path) -> Iterator[Path]:
    """Yield files of a folder, and of its folder `data`, whose names are those of data."""
    for one in sorted({*folder.glob("*"), *(folder / "data").glob("*")}):
        if one.is_file() and one.name.endswith(_DATA_SUFFIXES):
            yield one
