"""Hazards of a `tokenizer.json`: settings that would make gigabytes of a short text.

The library in Rust takes each setting at its word, and ends the whole process if the memory is not enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_mistral_lora.chat.oracle.tekken_file import pattern_hazard

_MAX_GROWTH = 100
_MAX_PADDING = 1_000_000


def hazard(value: Any) -> str:
    """Return the first setting of a parsed `tokenizer.json` that must not be used; empty if there is none."""
    return next(_hazards(value), "") if isinstance(value, dict) else ""


def _hazards(value: Mapping[str, Any]) -> Iterator[str]:
    padding = value.get("padding")
    if isinstance(padding, Mapping):
        strategy = padding.get("strategy")
        fixed = strategy.get("Fixed") if isinstance(strategy, Mapping) else None
        for name, number in (("strategy.Fixed", fixed), ("pad_to_multiple_of", padding.get("pad_to_multiple_of"))):
            if isinstance(number, int) and number > _MAX_PADDING:
                yield f"padding.{name} is {number:,}; expected at most {_MAX_PADDING:,} tokens"
    growth = 1.0
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        for step in _steps(value.get(part)):
            pattern = step.get("pattern")
            kind, text = next(iter(pattern.items()), ("", "")) if isinstance(pattern, Mapping) else ("", "")
            if kind == "Regex" and isinstance(text, str) and (found := pattern_hazard(text)):
                yield f"{part} has the pattern {found}"
            content = step.get("content")
            if part == "normalizer" and isinstance(content, str) and isinstance(text, str):
                # a regular expression, like an empty text, can match between any two characters
                growth *= max(1.0, len(content) / len(text) if kind == "String" and text else len(content) + 1)
    if growth > _MAX_GROWTH:
        yield f"its normalizer can make a text {growth:,.0f} times as long; expected at most {_MAX_GROWTH} times"


def _steps(component: Any) -> Iterator[Mapping[str, Any]]:
    """Yield a component, or those that a sequence of them holds."""
    waiting = [component]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Mapping):
            yield one
            inner = [one.get(name) for name in ("normalizers", "pretokenizers", "decoders")]
            waiting += [item for items in inner if isinstance(items, list) for item in items]
