"""Fill-in-the-middle: the texts before and after a gap, and the text that fills it, under the names that makers use."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from typing import Any

from pytest_mistral_lora.chat.fields import error_at, kind_of
from pytest_mistral_lora.chat.kinds.fim.rows import FIM_KEYS
from pytest_mistral_lora.formats.conversation import MESSAGE_LISTS
from pytest_mistral_lora.formats.drafts import Draft, RecordReading, take
from pytest_mistral_lora.formats.report import Change, changed
from pytest_mistral_lora.formats.row_format import Evidence, RowFormat

_NAMES = (
    # Mistral's API names prompt and suffix, and OpenAI's old API of completions did
    *itertools.product(("prompt",), ("suffix",), ("completion", "middle", "response")),
    # the parts as papers name them
    ("prefix", "suffix", "middle"),
)


def _recognise(record: Mapping[str, Any], present: Collection[str]) -> Evidence | None:
    if any(name in present for name in MESSAGE_LISTS):
        return None
    for names in _NAMES:
        if all(name in present and isinstance(record[name], str) for name in names):
            keys = dict(zip(FIM_KEYS, names, strict=True))
            return Evidence(", ".join(f"`{name}`" for name in names), keys)
    return None


def _convert(draft: Draft, reading: RecordReading) -> tuple[Draft, list[Change]]:
    changes: list[Change] = []
    texts: dict[str, str] = {}
    for name in FIM_KEYS:
        text, draft = take(draft, name, reading)
        key = reading.keys.get(name, name)
        if not isinstance(text, str):
            found = "is missing" if text is None else f"is {kind_of(text)}"
            raise error_at(reading.place / key, found, "a text")
        texts[name] = text
        if key != name:
            changes.append(changed("fim-keys", f"{key} is {name}"))
    return draft._replace(texts=texts), changes


def _unread(record: Mapping[str, Any], present: Collection[str]) -> tuple[str, str] | None:
    """Return what a record with a suffix is: no format of turns has one, and without it other rows are trained on."""
    if "suffix" not in present:
        return None
    if "prompt" in present and not any(name in present for name in MESSAGE_LISTS):
        title = "fill-in-the-middle without a completion (prompt, suffix)"
        advice = "Put the text that fills the gap beside them, under `completion`; all three are texts."
    else:
        title = "a row with a suffix (suffix)"
        advice = "A row of turns has none: write it into a message, or rename the key if it is no text to train on."
    return title, advice


FILL_IN_THE_MIDDLE = RowFormat(
    "fim",
    "fill-in-the-middle",
    dict(zip(FIM_KEYS, FIM_KEYS, strict=True)),
    _recognise,
    _convert,
    unread=_unread,
)
