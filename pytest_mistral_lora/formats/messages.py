"""Chat messages: a list of messages with a role and a content each, as the APIs of OpenAI and Mistral have them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pytest_mistral_lora.formats.conversation import find_conversation
from pytest_mistral_lora.formats.drafts import add_conversation
from pytest_mistral_lora.formats.row_format import Evidence, RowFormat


def _recognise(record: Mapping[str, Any], present: Collection[str]) -> Evidence | None:
    found = find_conversation(record)
    if found is None or found.is_sharegpt:
        return None
    return Evidence(found.words, {"messages": found.key})


MESSAGES = RowFormat("messages", "chat messages", {"messages": "messages"}, _recognise, add_conversation)
