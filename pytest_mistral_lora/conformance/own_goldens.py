"""The user's own goldens: rows in `*.jsonl` of a folder, and what was recorded of them for each target.

A row's name is its key `name`, or the file's name and the line number. What was recorded of it is
`templates/<target>/<name>.json` beside the row files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.jsonl import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.template import judge
from pytest_mistral_lora.errors import MistralLoraError, RowError
from pytest_mistral_lora.records.goldens import Case, Golden, check_case_name, golden_paths, load


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each row and each recorded golden of the user's folders."""
    for folder in settings.golden_folders:
        rows = dict(_rows(folder))
        recorded = {path.stem: path for path in golden_paths(folder / "templates" / target.name)}
        for name in sorted({*rows, *recorded}):
            path = recorded.get(name, folder / "templates" / target.name / f"{name}.json")
            run = partial(_record if settings.update else _judge, target, path, rows.get(name))
            yield Check(target, "template", f"own-{name}", run)


def _rows(folder: Path) -> Iterator[tuple[str, Row | RowError]]:
    for path in sorted(folder.glob("*.jsonl")):
        for number, item in enumerate(scan_jsonl(path), start=1):
            if isinstance(item, RowError):
                yield f"{path.stem}-{number}", item
                continue
            line, data = item
            yield _named(data, f"{path}:{line}", f"{path.stem}-{line}")


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
    golden = record(Case(path.stem, "A row of this golden folder.", row, frozenset()), target.tokenizer, path.parent)
    return Result(facts=(("golden", str(path)), ("written", _write(golden))))


def _write(golden: Golden) -> str:
    before = golden.path.read_text(encoding="utf-8") if golden.path.is_file() else None
    if before == golden.text():
        return "unchanged"
    golden.path.parent.mkdir(parents=True, exist_ok=True)
    golden.write()
    return "recorded" if before is None else "rewritten"
