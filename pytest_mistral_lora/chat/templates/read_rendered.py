"""Read a conversation back from a text that a chat template has rendered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.chat_template import ChatTemplate
from pytest_mistral_lora.errors import RowError

_TEXTS = ("Qaz", "Wsx", "Edc", "Rfv")
"""Texts of a conversation that a template renders as they are, and that it does not write itself."""


@dataclass(frozen=True, slots=True)
class _Frame:
    """The texts that a template writes around those of a conversation.

    Attributes:
        opening: The texts before the first question: one, or two with a system prompt between them.
        answer: The text between a question and its answer.
        question: The text between an answer and the next question.
        closing: The text behind the last answer.
    """

    opening: tuple[str, ...]
    answer: str
    question: str
    closing: str

    def read(self, text: str) -> list[dict[str, Any]] | None:
        """Return the messages of a text; None if it is not in this frame."""
        first, *after_system = self.opening
        if not (text.startswith(first) and text.endswith(self.closing)):
            return None
        body, messages = text[len(first) : len(text) - len(self.closing)], []
        if after_system:
            system, found, body = body.partition(after_system[0])
            if not found:
                return None
            messages.append({"role": "system", "content": system})
        for turn in body.split(self.question):
            question, found, answer = turn.partition(self.answer)
            if not found:
                return None
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return messages


class RenderedReader:
    """Reads conversations of a template with a system prompt, questions and answers.

    Its result is a guess: render it again, and compare.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def read(self, text: str) -> list[Row]:
        """Return the conversations that the template may have rendered to a text; empty if there are none."""
        found = (frame.read(text) for frame in self._frames)
        return [Row(tuple(messages)) for messages in found if messages]

    @cached_property
    def _frames(self) -> list[_Frame]:
        frames = [self._frame(has_system=has_system) for has_system in (False, True)]
        return [frame for frame in frames if frame is not None]

    def _frame(self, *, has_system: bool) -> _Frame | None:
        roles = ["user", "assistant", "user", "assistant"]
        messages = [{"role": role, "content": text} for role, text in zip(roles, _TEXTS, strict=True)]
        names = list(_TEXTS)
        if has_system:
            messages.insert(0, {"role": "system", "content": "Tgb"})
            names.insert(0, "Tgb")
        try:
            rest = self._template.render(Row(tuple(messages)))
        except RowError:
            return None
        parts = []
        for name in names:
            part, found, rest = rest.partition(name)
            if not found:
                return None
            parts.append(part)
        *opening, answer, question, again = parts
        if answer != again or not answer or not question:
            return None
        return _Frame(tuple(opening), answer, question, rest)
