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
from pytest_mistral_lora.errors import LibraryError, RenderError

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+>")
_SOURCE_CHARACTERS = 1_000_000
_CHANCE = frozenset(("random", "lipsum"))
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt")


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a template makes of a question, or the error that it raises, as JSON data.

    A question has the template's `source` and what is `asked`: `render`, `mark` (text, and the spans of the generation
    blocks), `unknowns`, or `training-source`. A `foreign` source must render the same text twice.
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
    foreign = question["foreign"]
    refusal = _refusal(source) if foreign else ""
    if refusal:
        raise RenderError(refusal, kind="overrun")
    text = _plain(source, question)[0]
    marked = training_source(source) if question["asked"] == "mark" else None
    marked_text, spans = "", None
    if marked is not None:
        marked_text, spans = _plain(marked, _copied(question) if foreign else question, mark=True)
    if foreign:
        # the marked text is a second rendering, if the blocks do not change it
        text = text if marked_text == text else _steady(question, text)
        _refuse_addresses(question, text)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"writes half a surrogate pair, {text[error.start]!r}, at character {error.start}"
        raise RenderError(f"the chat template {found}", kind="surrogate") from error
    # if the blocks change the text, their marks cannot be trusted
    return text, spans if marked_text == text else None


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


_own_rows = functools.lru_cache(maxsize=32)(lambda source: OwnRows(_in_full))
"""The renderer of rows by one template of this package's own, by its source."""


def _steady(question: Mapping[str, Any], text: str) -> str:
    """Return the text of a foreign template that a second rendering confirms.

    Args:
        question: The question.
        text: The text of the first rendering.

    Raises:
        RenderError: If no two renderings are alike.
        Exception: Any error that the template raises.
    """
    second = _plain(question["source"], _copied(question))[0]
    if second == text:
        return text
    # the clock may have ticked between the two
    third = _plain(question["source"], _copied(question))[0]
    if third != second:
        raise _unsteady(second, _difference(second, third))
    return second


def _copied(question: Mapping[str, Any]) -> dict[str, Any]:
    # an object that is printed with its address must not have the same address in two renderings
    return {**question, **{name: deepcopy(question[name]) for name in ("messages", "tools")}}


def _refuse_addresses(question: Mapping[str, Any], text: str) -> None:
    """Refuse a text with the address of an object: it differs from run to run, and only by chance within one.

    Raises:
        RenderError: If neither the template nor the row spells the address.
    """
    given = ""
    for match in _ADDRESS.finditer(text):
        given = given or repr(question)
        if match[0] not in given:
            raise _unsteady(text, match.start() + len(" at "))


def _unsteady(text: str, at: int) -> RenderError:
    found = f"in several ways, from character {at} on, after {text[max(0, at - 40) : at]!r}"
    return RenderError(f"the chat template renders one row {found}", kind="unsteady")


@functools.lru_cache(maxsize=32)
def _refusal(source: str) -> str:
    """Return why a source is not rendered: it is too long, or uses chance; empty if it may be rendered.

    Two renderings of a template that uses chance may be alike by chance.
    """
    from jinja2 import TemplateError, nodes

    if len(source) > _SOURCE_CHARACTERS:
        return f"the chat template has more than {_SOURCE_CHARACTERS:,} characters"
    try:
        tree = environment().parse(source)
    except TemplateError:
        return ""  # the rendering reports it
    filters = list(tree.find_all(nodes.Filter))
    names = [node.name for node in (*filters, *tree.find_all(nodes.Name))]
    for node in filters:
        if node.name == "map":  # `map('random')` applies a filter by its name
            names += [argument.value for argument in node.args if isinstance(argument, nodes.Const)]
    chance = next((name for name in names if name in _CHANCE), "")
    return f"the chat template uses {chance!r}, so that no two renderings are alike" if chance else ""


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
    warm_up = {"asked": "mark", "foreign": True, "messages": [], "tools": None, "variables": {}}
    sources: dict[str, Any] = {}

    def answer_with_source(question: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        # a source is sent once, and then named
        question["source"] = sources.setdefault(question["name"], question.get("source"))
        return answer(question), b""

    prepare = functools.partial(answer, {**warm_up, "source": "{{ messages }}"})
    limited.serve(prepare, answer_with_source, cpu_seconds=cpu_seconds, memory=memory)
