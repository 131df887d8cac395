"""What a user's golden folder has: rows, what was recorded of them, and recordings that nothing judges."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.chat.jsonl import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import AdapterTarget, EncodedTarget, RecipeTarget, Target, free_name
from pytest_mistral_lora.errors import MistralLoraError, RowError
from pytest_mistral_lora.records.goldens import check_case_name, golden_paths

if TYPE_CHECKING:
    from pytest_mistral_lora.records.files import Written

Kind = Literal["templates", "transcripts"]
"""The folders of a golden folder: renderings by tokenizers, and answers of adapters; each has a folder a target."""


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """A row of a golden folder.

    Attributes:
        row: The conversation.
        line: Its whole line, with the keys that are not of the conversation: `name`, `checks`, `max_new_tokens`.
    """

    row: Row
    line: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OwnCase:
    """A row of a golden folder and its file, for one target.

    Attributes:
        check: Name of the check, `own-<name>`.
        path: What was recorded, or is to be.
        row: The row; None where only the file is left, or it cannot be used.
        unusable: Why it cannot be used, or None.
        orphan: Whether the folder has rows, and this is a file without one.
    """

    check: str
    path: Path
    row: GoldenRow | None
    unusable: RowError | None
    orphan: bool


def own_cases(folders: Iterable[Path], kind: Kind, target: Target) -> Iterator[OwnCase]:
    """Yield a case for each row and each recorded file of the user's golden folders."""
    taken: set[str] = set()
    for folder in folders:
        rows, home = _unique(_rows(folder)), folder / kind / target.name
        for name in sorted({*rows, *(path.stem for path in golden_paths(home))}):
            check = free_name(f"own-{name}", taken)
            taken.add(check)
            row = rows.get(name)
            usable, wrong = (None, row) if isinstance(row, RowError) else (row, None)
            yield OwnCase(check, home / f"{name}.json", usable, wrong, orphan=bool(rows) and row is None)


def unused(folders: Iterable[Path], targets: Sequence[Target]) -> Iterator[Path]:
    """Yield each target's folder in the golden folders that belongs to none of the targets."""
    adapters = {one.name for one in targets if isinstance(one, AdapterTarget | RecipeTarget)}
    tokenizers = {one.name for one in targets if not isinstance(one, AdapterTarget | EncodedTarget)}
    for folder in folders:
        for kind, names in (("templates", tokenizers), ("transcripts", adapters)):
            homes = sorted((folder / kind).glob("*/"))
            yield from (home for home in homes if home.name not in names and golden_paths(home))


def refused(error: MistralLoraError, rule: str = "ML007") -> Result:
    """Return what an error comes to: the finding of a rule."""
    return Result((Finding(rule, error.found, error.place, error.expected),))


def recorded(case: OwnCase, written: Written) -> Result:
    """Return what recording a case comes to."""
    return Result(facts=(("golden", str(case.path)), ("written", written), ("orphan", case.orphan)))


def _unique(rows: Iterable[tuple[str, GoldenRow | RowError]]) -> dict[str, GoldenRow | RowError]:
    unique: dict[str, GoldenRow | RowError] = {}
    for name, row in rows:
        place = row.place if isinstance(row, RowError) else row.row.place
        if name in unique:
            first = unique[name]
            taken = first.place if isinstance(first, RowError) else first.row.place
            row = RowError(f"the name {name!r} is taken by {taken}", place=place, expected="another")
        unique[name] = row
    return unique


def _rows(folder: Path) -> Iterator[tuple[str, GoldenRow | RowError]]:
    for path in sorted(folder.glob("*.jsonl")):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "rows"
        for item in scan_jsonl(path):
            if isinstance(item, RowError):
                yield f"{stem}-{item.place.rpartition(':')[2]}", item
            else:
                line, data = item
                yield _named(data, f"{path}:{line}", f"{stem}-{line}")


def _named(data: Any, place: str, default: str) -> tuple[str, GoldenRow | RowError]:
    try:
        row = GoldenRow(parse_row(data, place=place), data)
        name = data.get("name", default)
        return check_case_name(name if isinstance(name, str) else repr(name), place=f"{place}, name"), row
    except RowError as error:
        return default, error
    except MistralLoraError as error:
        return default, RowError(error.found, place=error.place, expected=error.expected)
