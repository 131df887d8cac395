"""The turns of an encoded row: which assistant messages are encoded together, and the spans of each turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.encoded import EncodedRow, Span
from pytest_mistral_lora.chat.rows import Row

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle


def spoken_groups(row: Row, oracle: Oracle) -> list[list[int]]:
    """Return the groups of assistant messages that are encoded: v2 leaves out calls before the last user message."""
    groups = row.assistant_groups()
    if oracle.version != "v2":
        return groups
    last_user = max((n for n, message in enumerate(row.messages) if message["role"] == "user"), default=-1)
    return [group for group in groups if group[0] > last_user or not row.messages[group[0]].get("tool_calls")]


def assistant_turns(encoded: EncodedRow) -> dict[int, list[Span]]:
    """Return the spans of each assistant turn, by turn."""
    turns: dict[int, list[Span]] = {}
    for span in encoded.spans:
        if span.role == "assistant" and span.turn is not None:
            turns.setdefault(span.turn, []).append(span)
    return turns
