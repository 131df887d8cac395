"""Ask foreign chat templates in a process of their own, under limits of the operating system.

A template is code of unknown origin, and Jinja's sandbox bounds neither its time nor its memory. The process has only
transformers' renderer, renders all templates of a run, and is replaced if a limit ends it. Templates that this process
made itself are rendered here: mistral-common builds them from a closed set of settings, and no text of a file is in
them. If the system has no limits, as on Windows, no other template is rendered unless the user asks for it.
"""

from __future__ import annotations

import functools
import hashlib
import os
import signal
from collections.abc import Mapping
from typing import Any

from pytest_mistral_lora.chat.reading.limited import KeptProcess, LimitedProcess, Limits
from pytest_mistral_lora.chat.templates.renderer import answer, training_source
from pytest_mistral_lora.errors import NoTemplateError, RenderError

WITHOUT_LIMITS = "MISTRAL_LORA_RENDER_WITHOUT_LIMITS"
"""The environment variable that lets templates of files be rendered on a system without limits, if it is `1`."""

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
    if found.get("kind") == "limit":
        raise RenderError(f"the chat template {found['found']} for one row", kind="overrun")
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


class _Renderer(LimitedProcess):
    """A running process, which is sent each source once."""

    def __init__(self, limits: Limits) -> None:
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


def render_process(limits: Limits) -> KeptProcess:
    """Return a process for foreign templates."""
    return KeptProcess(functools.partial(_Renderer, limits), limits)


@functools.cache
def renderer() -> KeptProcess:
    """Return the process of this session for foreign templates."""
    return render_process(Limits())
