"""Processes for risky work, under the operating system's limits on time and memory, so that this process survives it.

Foreign templates are rendered in one (`chat.templates.isolated`), tables are read in one (`formats.tables`), and the
headers of pictures in one (`chat.reading.pictures`). Questions and answers are JSON
objects, a line each; bytes may follow an answer.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from pytest_mistral_lora.errors import MistralLoraError

_MIB = 1 << 20
_START_SECONDS = 120.0
# sys.path of this process, not of the environment: the same packages, and never those of the working folder
_CODE = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from {module} import {function}; {function}(*{given})"


class LimitedProcess:
    """A running process with its pipes.

    Args:
        module: The module of the function that it runs.
        function: The function, which answers questions by `serve`.
        given: Its arguments, as plain JSON data.
        title: What the process does, for an error: `renders chat templates`.
        check: Code whose error shows why it does not start.
        environment: Variables for it beside those of this process.

    Attributes:
        title: What the process does.
        process: The process itself.
        too_slow: Whether it was ended because an answer took too long.

    Raises:
        MistralLoraError: If it does not start.
    """

    def __init__(
        self,
        module: str,
        function: str,
        given: Sequence[Any],
        *,
        title: str,
        check: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        code = _CODE.format(module=module, function=function, given=[*given])
        command = [sys.executable, "-I", "-B", "-c", code, json.dumps([*map(str, sys.path)])]
        # threads of numpy would only take address space
        one_thread = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.title: str = title
        self.too_slow: bool = False
        try:
            self.process: subprocess.Popen[bytes] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **one_thread, **(environment or {})},
            )
        except OSError as error:
            raise MistralLoraError(f"cannot be started: {error.strerror}", place=sys.executable) from error
        self._stdin, self._stdout = cast("IO[bytes]", self.process.stdin), cast("IO[bytes]", self.process.stdout)
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(self._stdout, select.POLLIN)
        if self._line(_START_SECONDS) is None:
            ended = self.ending
            self.end()
            raise MistralLoraError(
                f"the process that {title} does not start ({ended})",
                place=sys.executable,
                next_step=f"Run: python -c '{check}'",
            )

    @property
    def is_running(self) -> bool:
        """Whether it still runs; another program may have ended it while it was idle."""
        return self.process.poll() is None

    def answer(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the answer to a question, or None if the process has ended or was too slow.

        Args:
            question: The question, as plain JSON data.
            seconds: Time on the clock, after which the process is ended.
        """
        try:
            self._stdin.write(json.dumps(question).encode() + b"\n")
            self._stdin.flush()
        except OSError:
            self.process.wait()
            return None
        line = self._line(seconds)
        return None if line is None else dict(json.loads(line))

    def read(self, size: int) -> bytes | None:
        """Return the bytes that follow an answer, or None if the process has ended before the last of them."""
        data = self._stdout.read(size)
        if len(data) == size:
            return data
        self.process.wait()
        return None

    def overrun(self, cpu_seconds: float, seconds: float) -> str:
        """Return the time limit that the last answer exceeded, in words; empty if the process ended otherwise."""
        if self.process.returncode == -getattr(signal, "SIGPROF", 0):
            return f"{cpu_seconds:g} seconds of CPU time"
        return f"{seconds:g} seconds" if self.too_slow else ""

    @property
    def ending(self) -> str:
        """The name of the signal that ended the process, or its exit code, in words."""
        code = self.process.returncode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"

    def end(self) -> None:
        """End the process and wait for it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self._stdin, self._stdout):
            # a question that was not read to its end is still in the pipe
            with contextlib.suppress(OSError):
                pipe.close()

    def _line(self, seconds: float) -> bytes | None:
        """Return the next line, or None if the process has ended, or does not write it in time and is ended."""
        if hasattr(select, "poll"):
            if not self._poll.poll(seconds * 1000):
                self._give_up()
            line = self._stdout.readline()
        else:
            # Windows cannot poll pipes
            timer = threading.Timer(seconds, self._give_up)
            timer.start()
            line = self._stdout.readline()
            timer.cancel()
        if line.endswith(b"\n"):
            return line
        self.process.wait()
        return None

    def _give_up(self) -> None:
        self.too_slow = True
        self.process.kill()


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one answer.

    Attributes:
        cpu_seconds: CPU time; the row of a template, or the header of a picture, takes about a thousandth of a second.
        memory: Bytes beyond those of the libraries, on Linux.
        seconds: Time on the clock, for a machine that does not count CPU time, or a process that sleeps.
    """

    cpu_seconds: float = 5.0
    memory: int = 512 * _MIB
    seconds: float = 60.0


class KeptProcess:
    """A process that answers questions: started at the first one, and again after a limit ended it.

    Args:
        start: Starts it.
        limits: Its limits.
    """

    def __init__(self, start: Callable[[], LimitedProcess], limits: Limits) -> None:
        self._start = start
        self._limits = limits
        self._lock = threading.Lock()
        # by process: a forked process must not share the pipes of its parent
        self._started: dict[int, LimitedProcess] = {}

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return an answer; one of the kind `limit` says in `found` what ended the process, which is then replaced.

        Raises:
            MistralLoraError: If the process cannot be started.
        """
        with self._lock:
            fresh = os.getpid() not in self._started
            answer, is_over = self._ask(question)
            if is_over and not fresh:
                # questions before this one may have left little memory, or another program may have ended the process
                answer, _ = self._ask(question)
        return answer

    def close(self) -> None:
        """End the process of this process, if it was started."""
        atexit.unregister(self.close)
        started = self._started.pop(os.getpid(), None)
        if started is not None:
            started.end()

    def _ask(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return an answer, and whether it may be another one in a new process."""
        limits = self._limits
        started = self._started.get(os.getpid())
        if started is None or not started.is_running:
            self.close()
            started = self._started[os.getpid()] = self._start()
            atexit.register(self.close)
        try:
            answer = started.answer(question, limits.seconds)
        except BaseException:
            # Ctrl-C between a question and its answer: the answer would be taken for that to the next question
            self.close()
            raise
        if answer is None:
            overrun = started.overrun(limits.cpu_seconds, limits.seconds)
            ended = f"ends the process that {started.title} ({started.ending})"
            return {"kind": "limit", "found": f"takes more than {overrun}" if overrun else ended}, not overrun
        if answer.get("kind") == "memory":
            self.close()
            return {"kind": "limit", "found": f"takes more than {limits.memory // _MIB} MiB"}, True
        return answer, False


def serve(
    prepare: Callable[[], object],
    answer: Callable[[Any], tuple[Mapping[str, Any], bytes]],
    *,
    cpu_seconds: float,
    memory: int,
) -> None:
    """Answer one question a line from stdin until it ends, each within limits of CPU time and memory.

    Args:
        prepare: Imports everything that answers import, before the memory is limited.
        answer: Answers a question, with the bytes that follow; a `kind` of `memory` ends this process.
        cpu_seconds: CPU time of one answer, after which the kernel ends this process.
        memory: Bytes that may be added to those of the libraries.
    """
    # Ctrl-C is for the process that asks
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    prepare()
    limit_memory(memory)
    timer = getattr(signal, "setitimer", None)
    _write(answers, {"ready": True})
    for line in sys.stdin.buffer:
        if timer is not None:
            # unlike RLIMIT_CPU it counts from here, in less than seconds; SIGPROF ends a process that has no handler
            timer(signal.ITIMER_PROF, cpu_seconds)
        try:
            found, data = answer(json.loads(line))
            _write(answers, found, data)
        except MemoryError:
            found = {"kind": "memory"}
            _write(answers, found)
        if found.get("kind") == "memory":
            return
        if timer is not None:
            timer(signal.ITIMER_PROF, 0)


def _write(answers: BinaryIO, found: Mapping[str, Any], data: bytes = b"") -> None:
    answers.write(json.dumps(found).encode() + b"\n" + data)
    answers.flush()


def limit_memory(more: int) -> None:
    """Let this process have a number of bytes of memory beside those that it has, on Linux."""
    # only Linux both reports the size of a process and enforces a limit on it
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + more, hard))
