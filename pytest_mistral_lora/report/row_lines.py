"""The row of each cause in a report: the line that its place names, for findings that do not carry their row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import scan_lines
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import Place, file_of

_LARGEST = 64 << 20
"""Largest file that is read again, in bytes."""
_LONGEST = 4000
_OF_ROWS = ("::dataset::", "::encoded::")


def with_rows(causes: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return causes as plain data, with the lines of JSON Lines files that their places name as their rows.

    A line is cut off if it is long; a line that is not JSON is shown, too.
    """
    found = [dict(cause) for cause in causes]
    wanted: dict[Path, dict[int, list[dict[str, Any]]]] = {}
    for cause in found:
        place = Place.from_json(cause["structured"]["place"])
        is_of_rows = any(part in cause["check"] for part in _OF_ROWS)
        if is_of_rows and not cause["row"] and place.record is not None and place.line is None:
            wanted.setdefault(Path(file_of(place)), {}).setdefault(place.record, []).append(cause)
    for file, of_lines in wanted.items():
        # the file may be gone, or hold its records in another way than one a line
        with suppress(InputError, OSError):
            if file.stat().st_size > _LARGEST:
                continue
            for number, line in islice(scan_lines(file), max(of_lines)):
                if number in of_lines and isinstance(line, bytes):
                    for cause in of_lines[number]:
                        cause["row"] = _shown(line)
    return found


def _shown(line: bytes) -> str:
    text = printable(line.decode("utf-8", "backslashreplace").strip(), lines=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
