"""Encoded rows whose answers are decoded as another message, or that decoding does not allow."""

from __future__ import annotations

import copy
from typing import Any

from bench_encoded import CALL, Data, hold_row
from gallery import Artifact, mutant

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}


def called_with(arguments: dict[str, Any], *, strict: bool = False) -> Data:
    """A row whose answer is a call."""
    call = copy.deepcopy(CALL)
    call["function"]["arguments"] = arguments
    function = {"name": "weather", "parameters": {**CITY, "required": ["city"]}}
    if strict:
        function["strict"] = True
    messages = [{"role": "user", "content": "Is it warm?"}, {"role": "assistant", "tool_calls": [call]}]
    return {"messages": messages, "tools": [{"type": "function", "function": function}]}


def spoken(*chunks: tuple[str, str]) -> Data:
    """A row whose answer has thoughts and texts."""
    content = [{"type": kind, kind: text} for kind, text in chunks]
    return {"messages": [{"role": "user", "content": "Is it warm?"}, {"role": "assistant", "content": content}]}


@mutant("ML649", says="the arguments of a call of weather read as")
def encoded_space_of_sentencepiece(artifact: Artifact) -> None:
    """An argument has the character by which SentencePiece writes a space."""
    hold_row(artifact, called_with({"city": "Rome\u2581Nord"}))


@mutant("ML650", says="a text before the thought: 'It is.'")
def encoded_thought_after_a_text(artifact: Artifact) -> None:
    """The ids of an answer have its thought behind its text."""
    hold_row(artifact, spoken(("text", "It is."), ("thinking", "Is it?")), "derived-v13-thinking")


@mutant("ML651", "N140", says="refuses token 6 of the answer, d")
def encoded_strict_arguments_in_another_order(artifact: Artifact) -> None:
    """The ids of a call have the arguments in another order than the schema of a strict tool."""
    hold_row(artifact, called_with({"days": 3, "city": "Rome"}, strict=True), "derived-v13")
