"""Ask foreign chat templates in a process of their own, under limits of the operating system.

A template is code of unknown origin, and Jinja's sandbox bounds neither its time nor its memory. The process has no
more than transformers' renderer, and is replaced once a limit has ended it. Templates that this process made itself
are asked here: mistral-common builds them from a closed set of settings, and nothing of a file is written into them.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

from pytest_mistral_lora.chat.templates.renderer import answer, training_source
from pytest_mistral_lora.errors import MistralLoraError, RenderError

_START_SECONDS = 120.0
_MIB = 1 << 20
# sys.path of this process, not of the environment: the same packages, and never those of the working folder
_CODE = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from pytest_mistral_lora.chat.templates.renderer import serve; serve(float(sys.argv[2]), int(sys.argv[3]))"
)
_OWN: set[str] = set()


def trust(source: str) -> str:
    """Note that this process made a template, so that it may be rendered here; return it."""
    _OWN.update((source, training_source(source) or source))
    return source


def ask(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to a question about a template, as `renderer.answer` does, here or in the other process.

    Raises:
        RenderError: If the template raises an error or passes a limit.
        MistralLoraError: If the other process cannot be started.
    """
    if question["source"] in _OWN:
        found = answer({**question, "foreign": False})
    else:
        found = renderer().ask({**question, "foreign": True})
    if "kind" in found:
        raise RenderError(found["found"], kind=found["kind"])
    return found


@dataclass(frozen=True, slots=True)
class RenderLimits:
    """The limits of one answer.

    Attributes:
        cpu_seconds: CPU time; a row takes about a thousandth of a second.
        memory: Bytes beyond those of the libraries, on Linux.
        seconds: Time on the clock, for a machine that does not count CPU time, or a process that sleeps.
    """

    cpu_seconds: float = 5.0
    memory: int = 512 * _MIB
    seconds: float = 60.0


class RenderProcess:
    """The process that renders foreign templates: started at the first question, and again after a limit ended it."""

    def __init__(self, limits: RenderLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        # by process: one that was forked from this one must not share its pipes
        self._started: dict[int, _Started] = {}

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return an answer; one that passes a limit is an error of the template, and the process is replaced.

        Raises:
            MistralLoraError: If the process cannot be started.
        """
        with self._lock:
            fresh = os.getpid() not in self._started
            found = self._ask(question)
            if found.get("kind") in ("memory", "ended") and not fresh:
                # rows before this one may have left little memory, or another program may have ended the process
                found = self._ask(question)
        if found.get("kind") == "memory":
            found["found"] = f"the chat template takes more than {self._limits.memory // _MIB} MiB for one row"
        return {**found, "kind": "overrun"} if found.get("kind") in ("memory", "ended") else found

    def close(self) -> None:
        """End the process of this process, if it was started."""
        started = self._started.pop(os.getpid(), None)
        if started is not None:
            started.end()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        limits = self._limits
        started = self._started.get(os.getpid())
        if started is None or started.process.poll() is not None:
            # it may have been ended from outside while it had nothing to do
            self.close()
            started = self._started[os.getpid()] = _Started(limits)
        try:
            found = started.answer(question, limits.seconds)
        except BaseException:
            # Ctrl-C between a question and its answer: the answer would be taken for that to the next question
            self.close()
            raise
        if found is None or found.get("kind") == "memory":
            self.close()
        if found is not None:
            return found
        code = started.process.returncode
        if code == -getattr(signal, "SIGPROF", 0):
            bound = f"takes more than {limits.cpu_seconds:g} seconds of CPU time for one row"
        elif started.too_slow:
            bound = f"takes more than {limits.seconds:g} seconds for one row"
        else:
            name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return {"kind": "ended", "found": f"the chat template takes down the process that renders it ({name})"}
        return {"kind": "overrun", "found": f"the chat template {bound}"}


class _Started:
    """A running process with its pipes."""

    def __init__(self, limits: RenderLimits) -> None:
        command = [sys.executable, "-I", "-B", "-c", _CODE, json.dumps([*map(str, sys.path)])]
        # threads of numpy would only take address space
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self.too_slow = False
        self._sources: set[str] = set()
        try:
            self.process = subprocess.Popen(
                [*command, str(limits.cpu_seconds), str(limits.memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise MistralLoraError(f"cannot be started: {error.strerror}", place=sys.executable) from error
        self._stdin, self._stdout = cast("IO[bytes]", self.process.stdin), cast("IO[bytes]", self.process.stdout)
        if hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(self._stdout, select.POLLIN)
        if self._line(_START_SECONDS) is None:
            code = self.process.returncode
            self.end()
            raise MistralLoraError(
                f"the process that renders chat templates does not start (exit code {code})",
                place=sys.executable,
                next_step="Run: python -c 'import transformers.utils.chat_template_utils'",
            )

    def answer(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the answer to a question, or None if the process has ended or was too slow."""
        source = question["source"]
        name = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        sent = dict(question, name=name)
        if name in self._sources:
            del sent["source"]
        try:
            self._stdin.write(json.dumps(sent).encode() + b"\n")
            self._stdin.flush()
        except OSError:
            self.process.wait()
            return None
        self._sources.add(name)
        line = self._line(seconds)
        return None if line is None else dict(json.loads(line))

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
            # Windows polls no pipes
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


@functools.cache
def renderer() -> RenderProcess:
    """Return the process of this session for foreign templates."""
    process = RenderProcess(RenderLimits())
    atexit.register(process.close)
    return process
