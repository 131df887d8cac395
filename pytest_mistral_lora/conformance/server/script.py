"""Run a user's script that asks a server: as for runners, in another process, with a time limit."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, RowError, RunnerError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import write_text

SECONDS = 900.0
"""Time limit of a script for all rows."""

_FORM = '{"row": 0, "input_ids": [1, 3, …]}, or "prompt_tokens": 7, or "refused": "…"'


def ask_script(script: Path, url: str, model: str, rows: Sequence[Row]) -> tuple[str, list[Any]]:
    """Return the versions that a script reports, and for each row the server's prompt or the error.

    Args:
        script: The script, run with this Python.
        url: The address of the server.
        model: The model to ask; empty for the script's own choice.
        rows: The rows.

    Raises:
        RunnerError: If the script hangs, fails, or breaks the contract of its output.
    """
    from pytest_mistral_lora.records.secrets import redacted
    from pytest_mistral_lora.runners.process import run_limited
    from pytest_mistral_lora.serving.server import chat_request

    with tempfile.TemporaryDirectory(prefix="mistral-server-") as temporary:
        rows_file, made = Path(temporary) / "rows.jsonl", Path(temporary) / "prompts.jsonl"
        # in ASCII: a script that splits the text into lines must not split at a line separator within a row
        write_text(rows_file, "".join(f"{json.dumps(chat_request(row))}\n" for row in rows))
        command = [
            sys.executable,
            script.absolute(),
            "--rows",
            rows_file,
            "--url",
            url,
            "--model",
            model,
            "--output",
            made,
        ]
        ended = run_limited(list(map(str, command)), seconds=SECONDS, folder=Path.cwd(), environment=os.environ)
        if ended.code:
            raise RunnerError(redacted(ended.reason), place=str(script))
        if not made.is_file():
            raise RunnerError("it wrote no file", place=str(script), expected=f"a line for each row: {_FORM}")
        return _read(made, script, len(rows))


def _read(file: Path, script: Path, rows: int) -> tuple[str, list[Any]]:
    missing = InputError("the script made nothing of it", place=str(script))
    versions, found = "", [missing] * rows
    for item in scan_jsonl(file, encoded=True):
        if isinstance(item, RowError):
            raise RunnerError(item.found, place=Place.of(script) / "its output", expected=_FORM)
        line, data = item
        if isinstance(data, Mapping) and isinstance(data.get("environment"), Mapping):
            versions = ", ".join(f"{name} {version}" for name, version in data["environment"].items())
            continue
        number = data.get("row") if isinstance(data, Mapping) else None
        if type(number) is not int or not 0 <= number < rows:
            place = Place.of(script) / f"line {line} of its output"
            raise RunnerError(f"{data!r:.200}", place=place, expected=f'an object with "row" from 0 to {rows - 1}')
        found[number] = _prompt(data, script)
    return versions, found


def _prompt(data: Mapping[str, Any], script: Path) -> Any:
    """Return the prompt of a row, or its error."""
    from pytest_mistral_lora.serving.answers import integers
    from pytest_mistral_lora.serving.server import ServedPrompt

    ids, count, refused = data.get("input_ids"), data.get("prompt_tokens"), data.get("refused")
    if isinstance(data.get("error"), str):
        return InputError(data["error"], place=str(script))
    if isinstance(refused, str) and refused:
        return ServedPrompt(refused=refused)
    if ids is None and type(count) is not int:
        return InputError(f"{data!r:.200}", place=str(script), expected=_FORM)
    try:
        return ServedPrompt(
            None if ids is None else integers(ids, Place.of(script)), count if type(count) is int else None
        )
    except InputError as error:
        return error
