"""Run a command that may hang, print anything, or leave children behind."""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.errors import InputError, RowError, RunnerError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.runners import supervisor

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


@dataclass(frozen=True, slots=True)
class Limits:
    """What a command may use beside time.

    Attributes:
        memory: Resident bytes of all its processes together, on Linux. None for three quarters of the machine's memory,
            at most 32 GiB.
        printed: Bytes on stdout and stderr.
        written: Bytes of a file, and of all files in the folder of its output.
        processes: Processes at one time, on Linux.
    """

    memory: int | None = None
    printed: int = 64 << 20
    written: int = 8 << 30
    processes: int = 512

    @property
    def most_memory(self) -> int:
        """The limit of memory in bytes."""
        if self.memory is not None:
            return self.memory
        return min(32 << 30, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 3 // 4)


def run_limited(
    command: Sequence[str | Path],
    *,
    seconds: float,
    folder: Path,
    environment: Mapping[str, str],
    hint: str = "",
    limits: Limits | None = None,
    output: Path | None = None,
) -> Ended:
    """Run a command, and end all of its processes when it ends, its time is up, or it passes a limit.

    Args:
        command: Program and arguments.
        seconds: The time limit.
        folder: Its working directory.
        environment: Its environment variables.
        hint: Advice for a command that runs out of time.
        limits: Its other limits; None for the defaults.
        output: The folder that it writes to, whose size is limited; None for no such folder.

    Raises:
        RunnerError: If the command cannot be started, runs out of time or passes a limit.
    """
    words = list(map(str, command))
    if not hasattr(os, "fork"):
        found, step = "is not started: this system does not limit processes", "Run it on Linux or macOS."
        raise RunnerError(found, place=words[0], next_step=step)
    # a file, not a pipe: a full pipe stops the command, and a child left behind keeps the pipe open
    with (
        tempfile.TemporaryFile() as printed,
        _Supervised(words, printed, folder, environment, limits or Limits()) as started,
    ):
        deadline = time.monotonic() + seconds
        # a folder of many files takes longer to measure than a process
        next_measure, pause = time.monotonic() + 1, 0.05
        while started.code is None:
            if time.monotonic() >= deadline:
                found = f"not done after {seconds:g} seconds{hint}{shown(_tail(printed.fileno()))}"
                raise RunnerError(found, place=words[min(1, len(words) - 1)])
            started.wait(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(0.25, pause * 1.2)
            is_due = output is not None and time.monotonic() >= next_measure
            found = started.passed(printed.fileno(), output if is_due else None)
            if is_due:
                next_measure = time.monotonic() + 1
            if found:
                tail = shown(_tail(printed.fileno()))
                raise RunnerError(f"{found}, and was ended{tail}", place=words[min(1, len(words) - 1)])
        return Ended(started.code, _tail(printed.fileno()))


class _Supervised:
    """A command below a process that adopts what it leaves; see `supervisor`.

    Attributes:
        code: Its exit code; None while it runs.
    """

    def __init__(
        self, words: list[str], printed: IO[bytes], folder: Path, environment: Mapping[str, str], limits: Limits
    ) -> None:
        """Start the command.

        Raises:
            RunnerError: If it cannot be started.
        """
        self.code: int | None = None
        self._limits = limits
        self._words = words
        self._told = b""
        self._mark = secrets.token_hex(16).encode()
        self._status, status = os.pipe()
        hold, self._hold = os.pipe()
        program = [sys.executable, "-I", "-S", supervisor.__file__, str(status), str(hold), str(limits.written)]
        try:
            self._process = subprocess.Popen(
                [*program, *words],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**environment, "MISTRAL_LORA_RUN": self._mark.decode()},
                start_new_session=True,
                pass_fds=(status, hold),
            )
        except OSError as error:
            os.close(self._status)
            os.close(self._hold)
            raise RunnerError(f"cannot be started: {error.strerror}", place=words[0]) from error
        finally:
            os.close(status)
            os.close(hold)

    def __enter__(self) -> _Supervised:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End all processes, also after Ctrl-C, which reaches only this process."""
        with suppress(OSError):
            # a byte, since a fork of this process may keep the pipe open
            os.write(self._hold, b".")
        os.close(self._hold)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE)
        if self._process.returncode != 0:
            # the command has stopped or ended it, and processes are left
            supervisor.end_all(self._left)
            self._process.kill()
            self._process.wait()
        os.close(self._status)

    def _left(self) -> dict[int, int]:
        """Return the group of each process of the command, by the variable that the command began with."""
        return {
            process: group
            for process, (_, group, state) in supervisor.processes().items()
            if state not in "ZX" and process != self._process.pid and self._is_marked(process)
        }

    def _is_marked(self, process: int) -> bool:
        with suppress(OSError):
            return self._mark in Path(f"/proc/{process}/environ").read_bytes()
        return False

    def wait(self, seconds: float) -> None:
        """Wait until the command ends, at most some seconds.

        Raises:
            RunnerError: If it cannot be started, or has ended the process above it.
        """
        if not select.select([self._status], [], [], seconds)[0]:
            return
        told = os.read(self._status, 4096)
        self._told += told
        for line in self._told.splitlines():
            kind, _, number = line.partition(b" ")
            if kind == b"error":
                raise RunnerError(f"cannot be started: {os.strerror(int(number))}", place=self._words[0])
            if kind == b"code":
                self.code = int(number)
        if not told and self.code is None:
            found = "ends the process that watches it"
            raise RunnerError(found, place=self._words[min(1, len(self._words) - 1)])

    def passed(self, printed: int, output: Path | None) -> str:
        """Return which limit the command has passed; empty for none.

        Args:
            printed: The file that it prints to.
            output: The folder that it writes to, or None.
        """
        limits = self._limits
        if os.fstat(printed).st_size > limits.printed:
            return f"prints more than {_size(limits.printed)}"
        if output is not None and _bytes_below(output, limits.written) > limits.written:
            return f"writes more than {_size(limits.written)}"
        if sys.platform != "linux":
            return ""
        found = supervisor.descendants(self._process.pid)
        if len(found) > limits.processes:
            return f"has more than {limits.processes} processes at once"
        if _memory(found, is_shared=False) > limits.most_memory and _memory(found) > limits.most_memory:
            return f"takes more than {_size(limits.most_memory)} of memory, all its processes together"
        return ""


_PATIENCE = 10.0
"""Seconds in which all processes of a command should have ended."""


def _memory(processes: Iterable[int], *, is_shared: bool = True) -> int:
    """Return the resident bytes of processes.

    Args:
        processes: Their ids.
        is_shared: Whether what several processes share is counted once, which takes longer.
    """
    found = 0
    for process in processes:
        with suppress(OSError, IndexError, ValueError):
            if is_shared:
                lines = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii").splitlines()
                found += next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
            else:
                pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
                found += pages * os.sysconf("SC_PAGE_SIZE")
    return found


def _bytes_below(folder: Path, most: int) -> int:
    """Return the bytes of all files in a folder; of a folder with more than `most`, any larger number."""
    found = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):  # removed since
                status = Path(parent, name).lstat()
                # a file of holes takes no room
                found += min(status.st_size, status.st_blocks * 512)
        if found > most:
            break
    return found


def _size(count: int) -> str:
    return f"{count / (1 << 30):g} GiB" if count >= 1 << 30 else f"{count / (1 << 20):g} MiB"


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
