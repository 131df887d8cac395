"""The message of an answer: what a client should get of the ids that a model says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_mistral_lora.chat.chunks.registry import type_of
from pytest_mistral_lora.chat.completions import GeneratedCall
from pytest_mistral_lora.chat.rows import Row, merged_chunks

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.versions import VersionFacts


class AnswerChunk(NamedTuple):
    """A part of the content of an answer.

    Attributes:
        text: Its text.
        is_thinking: Whether it is a thought.
        is_closed: Whether `[/THINK]` follows the thought; True for a text.
    """

    text: str
    is_thinking: bool = False
    is_closed: bool = True


@dataclass(frozen=True, slots=True)
class AnswerMessage:
    """The message of one answer.

    Attributes:
        chunks: Its texts and thoughts, in their order. No chunk of text is empty, and no two follow each other.
        calls: Its tool calls, in their order.
    """

    chunks: tuple[AnswerChunk, ...] = ()
    calls: tuple[GeneratedCall, ...] = ()

    @classmethod
    def of_last_turn(cls, row: Row, facts: VersionFacts) -> AnswerMessage:
        """Return the message of the last turn of the assistant in a row.

        Args:
            row: The row.
            facts: The facts of the tokenizer version, which say how messages and chunks are joined, and whether calls
                have ids.
        """
        return cls.of_turn([row.messages[index] for index in row.assistant_groups()[-1]], facts)

    @classmethod
    def of_turn(cls, messages: list[Mapping[str, Any]], facts: VersionFacts) -> AnswerMessage:
        """Return the message of one turn: of checked messages of the assistant that are encoded together.

        Args:
            messages: The messages.
            facts: As for `of_last_turn`.
        """
        chunks = merged_chunks((message.get("content") for message in messages), facts)
        calls = [call for message in messages for call in message.get("tool_calls") or ()]
        return cls(
            tuple(
                AnswerChunk(kind.text(chunk), is_thinking=kind.is_thought, is_closed=kind.is_closed(chunk))
                for chunk, kind in zip(chunks, map(type_of, chunks), strict=True)
            ),
            tuple(_call(call, facts) for call in calls),
        )

    @property
    def text(self) -> str:
        """Its text, without thoughts."""
        return "".join(chunk.text for chunk in self.chunks if not chunk.is_thinking)

    @property
    def thinking(self) -> str:
        """Its thoughts, joined."""
        return "".join(chunk.text for chunk in self.chunks if chunk.is_thinking)


def _call(call: Mapping[str, Any], facts: VersionFacts) -> GeneratedCall:
    """Return a call of a checked message with its arguments as a value, and its id if the version writes ids."""
    value = call["function"].get("arguments") or {}
    if isinstance(value, str):
        # arguments that are not JSON stay a text: a rule of rows reports them
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    return GeneratedCall(call["function"]["name"], value, call.get("id") if facts.writes_call_ids else None)


def canonical_json(value: Any) -> str:
    """Return JSON by which two values are the same if their types and numbers are, in any order of keys.

    To Python, 1, 1.0 and true are equal; to a tool they are not.
    """
    return json.dumps(value, sort_keys=True, ensure_ascii=False)
