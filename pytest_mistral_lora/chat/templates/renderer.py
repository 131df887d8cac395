"""Answer questions about a chat template: its text for a row, by transformers' own renderer, within bounds.

A foreign template is asked in a process of its own (`isolated`), which runs `serve`. Questions and answers are JSON
objects there, so that nothing but data crosses.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

from pytest_mistral_lora.chat.reading import limited
from pytest_mistral_lora.chat.templates.generation_blocks import has_generation, with_generation
from pytest_mistral_lora.chat.templates.own_rows import OwnRows, own_renderer
from pytest_mistral_lora.chat.templates.sandbox import BoundedTemplate
from pytest_mistral_lora.errors import LibraryError, RenderError

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a template makes of a question, or the error that it raises, as JSON data.

    A question has the template's `source` and what is `asked`: `render`, `mark` (text, and the spans of the generation
    blocks), `unknowns`, or `training-source`. A source that is `foreign` must render as its instrumented copy does.
    """
    from jinja2.exceptions import SecurityError

    kinds: dict[type[BaseException], str] = {
        SecurityError: "forbidden",
        RecursionError: "recursion",
        MemoryError: "memory",
    }
    try:
        return _ANSWERS[question["asked"]](question)
    except RenderError as error:
        return {"kind": error.kind, "found": error.found}
    except LibraryError:
        raise
    except Exception as error:
        # a template is foreign code and can raise anything
        kind = next((kind for cls, kind in kinds.items() if isinstance(error, cls)), "error")
        return {"kind": kind, "found": str(error) or type(error).__name__}


def _rendered(question: Mapping[str, Any]) -> dict[str, Any]:
    text, spans = _in_full(question) if question["foreign"] else _own_rows(question["source"]).rendered(question)
    return {"text": text, "spans": spans}


def _in_full(question: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]] | None]:
    source = question["source"]
    text = _agreed(question) if question["foreign"] else _plain(source, question)[0]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"writes half a surrogate pair, {text[error.start]!r}, at character {error.start}"
        raise RenderError(f"the chat template {found}", kind="surrogate") from error
    spans = None
    if question["asked"] == "mark":
        marked = training_source(source)
        if marked is not None:
            marked_text, spans = _plain(marked, question, mark=True)
            # blocks that change the text mark nothing that can be trusted
            spans = spans if marked_text == text else None
    return text, spans


@functools.lru_cache(maxsize=32)
def training_source(source: str) -> str | None:
    """Return a template with `{% generation %}` blocks; None if it has no branch for the assistant."""
    return source if has_generation(source) else with_generation(source)


def _plain(source: str, question: Mapping[str, Any], *, mark: bool = False) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    render = render_jinja_template if question["foreign"] else own_renderer()
    texts, spans = render(
        conversations=[question["messages"]],
        tools=question["tools"],
        chat_template=source,
        return_assistant_tokens_mask=mark,
        **question["variables"],
    )
    return texts[0], spans[0] if mark else []


_copy = functools.lru_cache(maxsize=32)(BoundedTemplate)
_own_rows = functools.lru_cache(maxsize=32)(lambda source: OwnRows(_in_full))
"""The renderer of rows by one template of this package's own, by its source."""


def _agreed(question: Mapping[str, Any]) -> str:
    """Return the text that the template and its instrumented copy both give.

    Raises:
        RenderError: If they do not agree, or a bound is passed.
        Exception: Any error that the template raises, observed or not.
    """
    source = question["source"]
    # copies: an object that is printed with its address must not have the same one in both renderings
    messages, tools = deepcopy((question["messages"], question["tools"]))
    given = {"messages": messages, "tools": tools, "documents": None, **question["variables"]}
    second, raised = "", ""
    try:
        second = _copy(source).run(given)
    except (RenderError, MemoryError, RecursionError):
        raise
    except Exception as error:
        raised = str(error) or type(error).__name__
    try:
        text = _plain(source, question)[0]
    except (MemoryError, RecursionError):
        raise
    except Exception:
        if raised:
            raise
        raise RenderError(
            "the chat template refuses a row, and renders it if it is observed", kind="observed"
        ) from None
    if not raised and text == second:
        return text
    # a clock may have ticked between the two, on either side
    again = _plain(source, question)[0]
    if not raised and again in (second, _copy(source).run(given)):
        return again
    # an object without a text of its own is printed with its address, which is another one each time or by chance not
    if again != text or _ADDRESS.search(text):
        at = _difference(text, again)
        found = f"in several ways, from character {at} on, after {text[max(0, at - 40) : at]!r}"
        raise RenderError(f"the chat template renders one row {found}", kind="unsteady")
    found = f"raises {raised!r}"
    if not raised:
        at = _difference(text, second)
        found = f"{text[at : at + 40]!r} becomes {second[at : at + 40]!r} at character {at}"
    raise RenderError(f"the chat template renders a row otherwise if it is observed: {found}", kind="observed")


def _difference(text: str, other: str) -> int:
    """Return the start of the word in which two texts first differ."""
    pairs = enumerate(zip(text, other, strict=False))
    at = next((index for index, (first, second) in pairs if first != second), min(len(text), len(other)))
    while at and text[at - 1].isalnum():
        at -= 1
    return at


def _unknowns(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return the undefined variables that a template prints for some rows, which leaves a hole in the text."""
    from jinja2 import Undefined
    from jinja2.utils import missing as missing_object

    missing: set[str] = set()

    class Noting(Undefined):
        """Notes that it was printed."""

        def __str__(self) -> str:
            if self._undefined_obj is missing_object:
                missing.add(str(self._undefined_name))
            return ""

    template = environment().overlay(undefined=Noting).from_string(question["source"])
    for messages in question["conversations"]:
        template.render({**dict.fromkeys(_GIVEN), **question["variables"], "messages": messages})
    return {"names": sorted(missing)}


def environment() -> Any:
    """Return transformers' own Jinja environment for chat templates."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template("").environment


_ANSWERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "render": _rendered,
    "mark": _rendered,
    "unknowns": _unknowns,
    "training-source": lambda question: {"source": training_source(question["source"])},
}


def serve(cpu_seconds: float, memory: int) -> None:
    """Answer one question a line from stdin until it ends, each within limits of CPU time and memory.

    Args:
        cpu_seconds: CPU time of one answer, after which the kernel ends this process.
        memory: Bytes that may be added to those of the libraries.
    """
    asked = {"asked": "mark", "foreign": True, "messages": [], "tools": None, "variables": {}}
    sources: dict[str, Any] = {}

    def answer_with_source(question: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        # a source comes once, then by its name
        question["source"] = sources.setdefault(question["name"], question.get("source"))
        return answer(question), b""

    prepare = functools.partial(answer, {**asked, "source": "{{ messages }}"})
    limited.serve(prepare, answer_with_source, cpu_seconds=cpu_seconds, memory=memory)
