"""Ask foreign chat templates in a process of their own, under limits of the operating system.

A template is code of unknown origin, and Jinja's sandbox bounds neither its time nor its memory. The process has only
transformers' renderer, renders all templates of a run, and is replaced if a limit ends it. Templates that this process
made itself are rendered here: mistral-common builds them from a closed set of settings, and no text of a file is in
them. If the system has no limits, as on Windows, no other template is rendered unless the user asks for it.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.chat.reading.limited import LimitedProcess
from pytest_mistral_lora.chat.templates.renderer import answer, training_source
from pytest_mistral_lora.errors import NoTemplateError, RenderError

WITHOUT_LIMITS = "MISTRAL_LORA_RENDER_WITHOUT_LIMITS"
"""The environment variable that lets templates of files be rendered on a system without limits, if it is `1`."""

_MIB = 1 << 20
_OWN: set[str] = set()


def trust(source: str) -> str:
    """Note that this process made a template, so that it may be rendered here; return it."""
    _OWN.update((source, training_source(source) or source))
    return source


def ask(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer to a question about a template, as `renderer.answer` does, here or in the other process.

    Raises:
        RenderError: If the template raises an error or passes a limit.
        NoTemplateError: If the template is not of our own making, and the system has no limits.
        MistralLoraError: If the other process cannot be started.
    """
    if question["source"] in _OWN:
        found = answer({**question, "foreign": False})
    else:
        _require_limits()
        found = renderer().ask({**question, "foreign": True})
    if "kind" in found:
        raise RenderError(found["found"], kind=found["kind"])
    return found


def _require_limits() -> None:
    """Refuse to render on a system that cannot end a process after its CPU time.

    Raises:
        NoTemplateError: So that the checks of the template are not checked.
    """
    if not hasattr(signal, "setitimer") and os.environ.get(WITHOUT_LIMITS) != "1":
        raise NoTemplateError(
            "the chat template is not rendered: this system limits neither the time nor the memory of a process",
            next_step=f"If you trust the template, set {WITHOUT_LIMITS}=1, or check it on Linux or macOS.",
        )


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
        # by process: a forked process must not share the pipes of its parent
        self._started: dict[int, _Started] = {}

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return an answer. If it passes a limit, the template gets the error, and the process is replaced.

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
        if started is None or not started.is_running:
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
        overrun = started.overrun(limits.cpu_seconds, limits.seconds)
        if not overrun:
            said = f"the chat template takes down the process that renders it ({started.ending})"
            return {"kind": "ended", "found": said}
        return {"kind": "overrun", "found": f"the chat template takes more than {overrun} for one row"}


class _Started(LimitedProcess):
    """A running process, which is sent each source once."""

    def __init__(self, limits: RenderLimits) -> None:
        super().__init__(
            "pytest_mistral_lora.chat.templates.renderer",
            "serve",
            (limits.cpu_seconds, limits.memory),
            title="renders chat templates",
            check="import transformers.utils.chat_template_utils",
        )
        self._sources: set[str] = set()

    def answer(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any] | None:
        """Return the answer to a question, or None if the process has ended or was too slow."""
        source = question["source"]
        name = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        sent = dict(question, name=name)
        if name in self._sources:
            del sent["source"]
        self._sources.add(name)
        return super().answer(sent, seconds)


@functools.cache
def renderer() -> RenderProcess:
    """Return the process of this session for foreign templates."""
    process = RenderProcess(RenderLimits())
    atexit.register(process.close)
    return process
