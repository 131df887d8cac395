"""What an extraction script wrote, as an encoded-rows file: one row in, one row out, in the order of the source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.jsonl import scan_jsonl
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError, RunnerError


@dataclass(frozen=True)
class RunnerOutput:
    """The lines that a script wrote.

    Attributes:
        environment: What the script ran under: version by distribution.
        notes: What it says of the rows as a whole.
        records: The line of each row, by the row's number.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    records: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def lines(self, rows: Iterable[Row]) -> Iterator[str]:
        """Yield a line of an encoded-rows file for each row; one that the runner did not write is an error."""
        for number, row in enumerate(rows):
            record = self.records.get(number, {"error": "the runner made nothing of it"})
            yield json.dumps({"row": number, **row.to_json(), **record}, ensure_ascii=False)


def read_output(path: Path, rows: int) -> RunnerOutput:
    """Read what a script wrote for a number of rows.

    Raises:
        RunnerError: If it wrote no file, or something that is not its contract.
    """
    if not path.is_file():
        raise RunnerError("no file was written", place=str(path), expected="encoded rows, one JSON object a line")
    environment: dict[str, str] = {}
    notes: list[str] = []
    records: dict[int, Mapping[str, Any]] = {}
    for item in scan_jsonl(path):
        if isinstance(item, RowError):
            raise RunnerError(item.found, place=item.place, expected="encoded rows, one JSON object a line")
        line, data = item
        place = f"{path.name}:{line}"
        if isinstance(data, Mapping) and isinstance(data.get("environment"), Mapping):
            environment |= {str(name): str(value) for name, value in data["environment"].items()}
            continue
        if isinstance(data, Mapping) and isinstance(data.get("note"), str):
            notes.append(data["note"])
            continue
        number, record = _record(data, place, rows)
        if number in records:
            record = {"error": "the runner wrote it twice"}
        records[number] = record
    return RunnerOutput(environment, tuple(notes), records)


def _record(data: Any, place: str, rows: int) -> tuple[int, Mapping[str, Any]]:
    number = data.get("row") if isinstance(data, Mapping) else None
    if type(number) is not int or not 0 <= number < rows:
        raise RunnerError(f"{data!r:.200}", place=place, expected=f'an object with "row" from 0 to {rows - 1}')
    if isinstance(data.get("error"), str):
        return number, {"error": data["error"]}
    for key in ("input_ids", "labels"):
        values = data.get(key)
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise RunnerError(f"{key} is {values!r:.80}", place=place, expected="a list of integers")
    return number, {"input_ids": data["input_ids"], "labels": data["labels"]}
