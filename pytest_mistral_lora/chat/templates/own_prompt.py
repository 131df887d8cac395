"""A chat template's own system prompt, which it writes into conversations without a system message.

Ministral 3, Devstral 2 and Small 4 are published with one. mistral-common adds none, so that a row without a system
message is compared with mistral-common's encoding of that row behind the template's own prompt.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import RowError

_SENTINEL = "A system prompt that no checkpoint has."
_QUESTION = {"role": "user", "content": "What is the time?"}
_TOOL = {
    "type": "function",
    "function": {"name": "clock", "description": "", "parameters": {"type": "object", "properties": {}}},
}
_THOUGHT = re.compile(r"\[THINK\](.*?)\[/THINK\]", re.DOTALL)
# not \boxed{answer} of LaTeX, nor {{escaped}}
_CLOCK = re.compile(r"""strftime_now\(\s*["']([^"']+)["']""")
_PLACEHOLDER = re.compile(r"(?<![\w\\{])\{[A-Za-z_]\w*\}(?!\})")


@dataclass(frozen=True, slots=True)
class OwnSystemPrompt:
    """A system prompt that a template writes by itself.

    Attributes:
        text: The text as it is rendered.
    """

    text: str

    @property
    def content(self) -> str | list[dict[str, Any]]:
        """The `content` of a system message with the same rendering: chunks if the text has thinking."""
        if not _THOUGHT.search(self.text):
            return self.text
        chunks: list[dict[str, Any]] = []
        for number, part in enumerate(_THOUGHT.split(self.text)):
            if number % 2:
                chunks.append(THINKING.chunk(part))
            elif part:
                chunks.append({"type": "text", "text": part})
        return chunks

    @property
    def placeholders(self) -> list[str]:
        """The names in braces that the text holds, such as `{today}`: no library replaces them."""
        return list(dict.fromkeys(_PLACEHOLDER.findall(self.text)))

    def is_dated(self, source: str) -> bool:
        """Return whether the text holds a date of the clock, in a format that the template's source asks for."""
        now = datetime.now()
        return any(now.strftime(layout) in self.text for layout in _CLOCK.findall(source))

    def before(self, row: Row) -> Row:
        """Return a row behind this prompt."""
        return replace(row, messages=({"role": "system", "content": self.content}, *row.messages))


def find_own_prompt(render: Callable[[Row], str], *, tools: bool = False) -> OwnSystemPrompt | None:
    """Return the system prompt that a template writes by itself, or None.

    A question is rendered without a system message and with one. If the two differ in the prompt alone, it is the
    template's own.

    Args:
        render: Renders a row, or raises `RowError`.
        tools: Whether the question has tools: a template may write another prompt beside them.
    """
    question = Row((_QUESTION,), (_TOOL,) if tools else None)
    try:
        without = render(question)
        given = render(replace(question, messages=({"role": "system", "content": _SENTINEL}, _QUESTION)))
    except RowError:
        return None
    parts = given.split(_SENTINEL)
    if len(parts) != 2 or len(without) <= sum(map(len, parts)):
        return None
    before, after = parts
    if _QUESTION["content"] not in before + after:
        # it left the question out, which is then no prompt of its own
        return None
    if not without.startswith(before):
        # SentencePiece has a space before a text, which mistral-common's template of v7 leaves out before this one
        before = before.rstrip(" ")
    if not without.startswith(before) or not without.endswith(after):
        return None
    return OwnSystemPrompt(without[len(before) : len(without) - len(after)])
