"""The user's own goldens: rows in `*.jsonl` of a folder, and what was recorded of them for each target.

A row's name is its key `name`, or the file's name and the line number. What was recorded of it is
`templates/<target>/<name>.json` beside the row files. A name that a folder uses twice is an error; where two folders
share one, the later check gets a number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.jsonl import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import Target, free_name
from pytest_mistral_lora.conformance.template.checks import judge
from pytest_mistral_lora.errors import MistralLoraError, OracleRejection, RowError, TokenizerError
from pytest_mistral_lora.records.goldens import Case, Golden, check_case_name, golden_paths, load


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each row and each recorded golden of the user's folders."""
    cases: set[str] = set()
    for folder in settings.golden_folders:
        rows = _unique(_rows(folder))
        recorded = {path.stem: path for path in golden_paths(folder / "templates" / target.name)}
        for name in sorted({*rows, *recorded}):
            path = recorded.get(name, folder / "templates" / target.name / f"{name}.json")
            run = partial(_record if settings.update else _judge, target, path, rows.get(name))
            case = free_name(f"own-{name}", cases)
            cases.add(case)
            yield Check(target, "template", case, run)


def _unique(rows: Iterable[tuple[str, Row | RowError]]) -> dict[str, Row | RowError]:
    unique: dict[str, Row | RowError] = {}
    for name, row in rows:
        if name in unique:
            row = RowError(f"the name {name!r} is taken by {unique[name].place}", place=row.place, expected="another")
        unique[name] = row
    return unique


def _rows(folder: Path) -> Iterator[tuple[str, Row | RowError]]:
    for path in sorted(folder.glob("*.jsonl")):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "rows"
        for item in scan_jsonl(path):
            if isinstance(item, RowError):
                yield f"{stem}-{item.place.rpartition(':')[2]}", item
            else:
                line, data = item
                yield _named(data, f"{path}:{line}", f"{stem}-{line}")


def _named(data: Any, place: str, default: str) -> tuple[str, Row | RowError]:
    try:
        row = parse_row(data, place=place)
        name = data.get("name", default)
        return check_case_name(name if isinstance(name, str) else repr(name), place=f"{place}, name"), row
    except RowError as error:
        return default, error
    except MistralLoraError as error:
        return default, RowError(error.found, place=error.place, expected=error.expected)


def _judge(target: Target, path: Path, row: Row | RowError | None) -> Result:
    if isinstance(row, RowError):
        return Result((Finding("ML007", row.found, row.place, row.expected),))
    if not path.is_file():
        return Result((Finding("ML007", "the row is not recorded", row.place if row else "", f"a golden {path}"),))
    try:
        golden = load(path)
    except MistralLoraError as error:
        return Result((Finding("ML001", error.found, error.place),))
    if row is not None and row != golden.row:
        found = Finding("ML007", "the row is not the one that was recorded", row.place, f"the row of {path}")
        return Result((replace(found, row=row.to_jsonl()),))
    return judge(target, golden, recorded=True)


def _record(target: Target, path: Path, row: Row | RowError | None) -> Result:
    from pytest_mistral_lora.records.recording import record

    if isinstance(row, RowError):
        return Result((Finding("ML007", row.found, row.place, row.expected),))
    if row is None:
        try:
            row = load(path).row
        except MistralLoraError as error:
            return Result((Finding("ML001", error.found, error.place),))
    case = Case(path.stem, "A row of this golden folder.", row, frozenset())
    try:
        golden = record(case, target.tokenizer, path.parent)
    except TokenizerError:
        raise
    except OracleRejection as error:
        return Result((Finding("ML007", error.found, row.place or error.place, error.expected, row=row.to_jsonl()),))
    except MistralLoraError as error:
        return Result((Finding("ML004", error.found, row.place, error.next_step, row=row.to_jsonl()),))
    return Result(facts=(("golden", str(path)), ("written", _write(golden))))


def _write(golden: Golden) -> str:
    before = golden.path.read_text(encoding="utf-8") if golden.path.is_file() else None
    if before == golden.text():
        return "unchanged"
    golden.path.parent.mkdir(parents=True, exist_ok=True)
    golden.write()
    return "recorded" if before is None else "rewritten"
