"""Run a command that may hang, print anything, or leave children behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pytest_mistral_lora.errors import RunnerError

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
    def last_line(self) -> str:
        """The last line that it printed."""
        return self.tail.rpartition("\n")[2]


def run_limited(
    command: Sequence[str | Path], *, seconds: float, folder: Path, environment: Mapping[str, str]
) -> Ended:
    """Run a command in a process group of its own, and end the whole group when it is over or out of time.

    Args:
        command: Program and arguments.
        seconds: How long it may take.
        folder: Where it runs.
        environment: Its environment variables.

    Raises:
        RunnerError: If it cannot be started, or is not done in time.
    """
    with tempfile.TemporaryFile() as printed:
        try:
            process = subprocess.Popen(
                list(map(str, command)),
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise RunnerError(f"cannot be started: {error.strerror}", place=str(command[0])) from error
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            _end(process)
            raise RunnerError(
                f"not done after {seconds:g} seconds{shown(_tail(printed.fileno()))}",
                place=str(command[1]),
                next_step="Give it fewer rows or more time (--time-limit), or look at what it waits for.",
            ) from error
        except BaseException:
            _end(process)
            raise
        _end(process)  # its children, if it left any
        return Ended(code, _tail(printed.fileno()))


def shown(tail: str) -> str:
    """Return the last lines of a command as part of an error message; nothing where it printed nothing."""
    return "; it printed last:\n" + "\n".join(f"  | {line}" for line in tail.splitlines()) + "\n" if tail else ""


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # the group has ended; macOS says so by the second
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(handle: int) -> str:
    size = os.fstat(handle).st_size
    text = os.pread(handle, _TAIL_BYTES, max(0, size - _TAIL_BYTES)).decode("utf-8", "replace")
    text = _COLOUR.sub("", text.replace("\r", "\n"))
    lines = ["".join(c for c in line if c.isprintable()).rstrip() for line in text.split("\n")]
    return "\n".join([line[:500] for line in lines if line][-_TAIL_LINES:])
