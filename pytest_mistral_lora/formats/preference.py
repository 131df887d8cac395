"""Preference pairs: a prompt with a chosen and a rejected answer; the row keeps the chosen one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pytest_mistral_lora.formats.conversation import MESSAGE_LISTS
from pytest_mistral_lora.formats.drafts import Draft, RecordReading, add_answer, add_side, take, take_joined
from pytest_mistral_lora.formats.report import Change, changed, lost
from pytest_mistral_lora.formats.row_format import Evidence, RowFormat

_PAIRS = (
    ("chosen", "rejected"),
    ("preferred_output", "non_preferred_output"),
    ("chosen_messages", "rejected_messages"),
)
_PROMPTS = ("prompt", "input", *MESSAGE_LISTS[:3], "question")


def _recognise(record: Mapping[str, Any], present: Collection[str]) -> Evidence | None:
    for chosen, rejected in _PAIRS:
        if chosen not in present or rejected not in present:
            continue
        keys = {"chosen": chosen, "rejected": rejected}
        prompt = next((key for key in _PROMPTS if key in present), "")
        if "instruction" in present:
            keys["prompt"] = "instruction"
            if "input" in present:
                keys["input"] = "input"
        elif prompt:
            keys["prompt"] = prompt
        return Evidence(f"`{chosen}` and `{rejected}`", keys)
    return None


def _convert(draft: Draft, reading: RecordReading) -> tuple[Draft, list[Change]]:
    changes = [lost("rejected"), changed("chosen")]
    chosen, draft = take(draft, "chosen", reading)
    _, draft = take(draft, "rejected", reading)
    if "input" in reading.keys:
        question, draft, more = take_joined(draft, "prompt", reading)
        changes += more
    else:
        question, draft = take(draft, "prompt", reading)
    if question is not None:
        draft, more = add_side(draft, reading.keys.get("prompt", "prompt"), question, "user", reading, weight=0)
        changes += more
    draft, more = add_answer(draft, reading.keys["chosen"], chosen, reading)
    return draft, changes + more


PREFERENCE = RowFormat(
    "preference",
    "preference pairs",
    {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
    _recognise,
    _convert,
    is_tried_first=True,
)
