"""Make a row that breaks a rule as small as it can be, where Hypothesis has stopped too early."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import MistralLoraError

_TRIES = 300


def smallest(finding: Callable[[Row], Finding | None], found: Finding, data: dict[str, Any]) -> Finding:
    """Return the finding of the smallest row that breaks the same rule: messages, keys and texts are left out in turn.

    Args:
        finding: Judges a row.
        found: What it finds in the row.
        data: The row, as plain data.
    """
    tries = _TRIES
    candidates = _smaller(data)
    while tries and (candidate := next(candidates, None)) is not None:
        tries -= 1
        try:
            now = finding(parse_row(candidate))
        except MistralLoraError:
            continue
        if now is not None and now.rule == found.rule:
            found, candidates = now, _smaller(candidate)
    return found


def _smaller(data: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in ("tools", "reasoning_effort"):
        if key in data:
            yield {name: value for name, value in data.items() if name != key}
    messages = data["messages"]
    for index, message in enumerate(messages):
        yield data | {"messages": [*messages[:index], *messages[index + 1 :]]}
        for smaller in _smaller_messages(message):
            yield data | {"messages": [*messages[:index], smaller, *messages[index + 1 :]]}


def _smaller_messages(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    content = message.get("content")
    if isinstance(content, list):
        yield from (message | {"content": [*content[:n], *content[n + 1 :]]} for n in range(len(content)))
        yield from (message | {"content": chunk["text"]} for chunk in content if chunk.get("text"))
    elif content:
        half = len(content) // 2
        shorter = ("0",) if len(content) == 1 else ("0", content[:half], content[half:], content[1:], content[:-1])
        yield from (message | {"content": text} for text in shorter if text != content)
    if "weight" in message:
        yield {name: value for name, value in message.items() if name != "weight"}
