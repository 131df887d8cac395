"""Run a command that may hang, print anything, or leave children behind, and read what it wrote."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.errors import InputError, RowError, RunnerError
from pytest_mistral_lora.places import Place

# only the end of a log is read, whatever its length
_TAIL_BYTES = 4000
_TAIL_LINES = 15
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended.

    Attributes:
        code: Its exit code.
        tail: The last lines that it printed, of stdout and stderr.
    """

    code: int
    tail: str

    @property
    def reason(self) -> str:
        """The failure, with the last lines that the command printed."""
        if self.code == -signal.SIGKILL:
            return f"is killed (SIGKILL), as by a system that is out of memory{shown(self.tail)}"
        if self.code < 0:
            return f"is ended by {signal.Signals(-self.code).name}{shown(self.tail)}"
        last_line = self.tail.rpartition("\n")[2] or "it printed nothing"
        return f"ends with exit code {self.code}: {last_line}{shown(self.tail)}"


def run_limited(
    command: Sequence[str | Path], *, seconds: float, folder: Path, environment: Mapping[str, str], hint: str = ""
) -> Ended:
    """Run a command, and end its group of processes when it ends or its time is up.

    Args:
        command: Program and arguments.
        seconds: The time limit.
        folder: Its working directory.
        environment: Its environment variables.
        hint: Advice for a command that runs out of time.

    Raises:
        RunnerError: If the command cannot be started, or runs out of time.
    """
    words = list(map(str, command))
    if not hasattr(os, "killpg"):
        found, step = "is not started: this system has no groups of processes", "Run it on Linux or macOS."
        raise RunnerError(found, place=words[0], next_step=step)
    # a file, not a pipe: a full pipe stops the command, and a child left behind keeps the pipe open
    with tempfile.TemporaryFile() as printed:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": printed, "stderr": subprocess.STDOUT}
        try:
            process = subprocess.Popen(words, cwd=folder, env=environment, start_new_session=True, **options)
        except OSError as error:
            raise RunnerError(f"cannot be started: {error.strerror}", place=words[0]) from error
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            found = f"not done after {seconds:g} seconds{hint}{shown(_tail(printed.fileno()))}"
            raise RunnerError(found, place=words[min(1, len(words) - 1)]) from error
        finally:
            # also after Ctrl-C, which reaches only this process
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return Ended(code, _tail(printed.fileno()))


def shown(tail: str) -> str:
    """Return the last lines of a command as part of an error message; empty if it printed nothing."""
    return "; it printed last:\n" + "\n".join(f"  | {line}" for line in tail.splitlines()) + "\n" if tail else ""


def _tail(handle: int) -> str:
    size = os.fstat(handle).st_size
    text = os.pread(handle, _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace")
    # progress bars write over their own line, in colours
    text = _COLOUR.sub("", text.replace("\r", "\n"))
    lines = ["".join(c for c in line if c.isprintable()).rstrip() for line in text.split("\n")]
    return "\n".join([line[:500] for line in lines if line][-_TAIL_LINES:])


@dataclass(frozen=True)
class RunnerOutput:
    """The lines that a script wrote.

    Attributes:
        environment: The script's environment: version by distribution.
        notes: Its notes about the rows as a whole.
        records: The line of each row, by the row's number.
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    records: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)

    def lines(self, records: Iterable[Mapping[str, Any]]) -> Iterator[str]:
        """Yield a line of an encoded-rows file for each row; a row that the runner did not write is an error.

        Args:
            records: The rows that the script got, in order.
        """
        for number, row in enumerate(records):
            made = self.records.get(number, {"error": "the runner made nothing of it"})
            yield json.dumps({"row": number, **row, **made}, ensure_ascii=False)


ReadRecord = Callable[[Any, Place], tuple[int, Mapping[str, Any]]]
"""Returns the number and the content of a script's record, by its value and its place; refuses a broken one."""


def read_output(path: Path, read: ReadRecord) -> RunnerOutput:
    """Read the output of a script.

    Args:
        path: The file that it wrote.
        read: Reads a record.

    Raises:
        RunnerError: If it breaks the contract of a script's output.
    """
    environment: dict[str, str] = {}
    notes: list[str] = []
    records: dict[int, Mapping[str, Any]] = {}
    for item in _items(path):
        if isinstance(item, RowError):
            raise _broken_contract(item)
        line, data = item
        place = Place.of(path.name, line)
        if isinstance(data, Mapping) and isinstance(data.get("environment"), Mapping):
            environment |= {str(name): str(value) for name, value in islice(data["environment"].items(), _MOST_FACTS)}
            environment = dict(islice(environment.items(), _MOST_FACTS))
            continue
        if isinstance(data, Mapping) and isinstance(data.get("note"), str):
            # they are a part of each verdict
            if len(notes) < _MOST_FACTS:
                notes.append(data["note"][:_LONGEST_NOTE])
            continue
        number, record = read(data, place)
        if number in records:
            record = {"error": "the runner wrote it twice"}
        records[number] = record
    return RunnerOutput(environment, tuple(notes), records)


def _items(path: Path) -> Iterator[tuple[int, Any] | RowError]:
    """Yield the lines of a script's output, one at a time: together they may be larger than the memory.

    Raises:
        RunnerError: If the file cannot be read.
    """
    try:
        yield from scan_jsonl(path, encoded=True)
    except InputError as error:
        raise _broken_contract(error) from error


_MOST_FACTS, _LONGEST_NOTE = 1000, 4000


def _broken_contract(error: InputError) -> RunnerError:
    return RunnerError(error.found, place=error.place, expected="encoded rows, one JSON object a line")


_SIDES = ("chosen", "rejected", "completion")


def reader_of(rows: int) -> ReadRecord:
    """Return the reader of the records of a trainer that got a number of rows."""

    def read(data: Any, place: Place) -> tuple[int, Mapping[str, Any]]:
        number = row_number(data, place, rows)
        if isinstance(data.get("error"), str):
            return number, {"error": data["error"]}
        of_sides = [f"{side}_{column}" for side in _SIDES for column in ("input_ids", "labels")]
        if keys := [key for key in of_sides if key in data]:
            label = {"label": data["label"]} if "label" in data else {}
            return number, label | {key: integers(data, key, place) for key in keys}
        return number, {key: integers(data, key, place) for key in ("input_ids", "labels")}

    return read


def row_number(data: Any, place: Place, rows: int | None = None) -> int:
    """Return the number of a script's record.

    Args:
        data: The value of the record.
        place: Its place.
        rows: The number of rows that the script got; None if it got none.

    Raises:
        RunnerError: If it is no object, or has no number of a row.
    """
    number = data.get("row") if isinstance(data, Mapping) else None
    # `isinstance` would accept true as row 1
    if type(number) is not int or number < 0 or (rows is not None and number >= rows):
        end = "on" if rows is None else f"to {rows - 1}"
        raise RunnerError(f"{data!r:.200}", place=place, expected=f'an object with "row" from 0 {end}')
    return number


def integers(data: Mapping[str, Any], key: str, place: Place) -> list[int]:
    """Return the integers of a key of a script's record.

    Raises:
        RunnerError: If it has no such list.
    """
    values = data.get(key)
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise RunnerError(f"{key} is {values!r:.80}", place=place, expected="a list of integers")
    return values
