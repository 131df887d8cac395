"""Rows that nobody writes, whose ids look like those of a fault."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import text_of


def looks_like_a_fault(row: dict[str, Any], oracle: Oracle) -> bool:
    """Return whether the ids of a row are read back as another row on purpose."""
    if oracle.facts.system_in != "own-turn" and _parts_users_without_a_prompt(row):
        return True
    return oracle.kind == "spm" and oracle.facts.strips_answers and _ends_like_a_space(row)


def _parts_users_without_a_prompt(row: dict[str, Any]) -> bool:
    """Return whether empty system messages alone part turns of the user."""
    prompts = [message["content"] for message in row["messages"][1:] if message["role"] == "system"]
    return bool(prompts) and not any(text_of(prompt) for prompt in (*prompts, row["messages"][0]["content"]))


def _ends_like_a_space(row: dict[str, Any]) -> bool:
    """Return whether an answer ends in the sign that SentencePiece writes for a space."""
    answers = (message for message in row["messages"] if message["role"] == "assistant")
    return any(text_of(answer.get("content")).rstrip(" ").endswith("\u2581") for answer in answers)
