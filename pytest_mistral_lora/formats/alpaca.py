"""Alpaca: an instruction with an optional input and its output, perhaps after rounds of `history`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pytest_mistral_lora.chat.fields import Place, kind_of
from pytest_mistral_lora.formats.drafts import Draft, RecordReading, add_side, take, take_joined
from pytest_mistral_lora.formats.report import Change, changed
from pytest_mistral_lora.formats.row_format import Evidence, RowFormat
from pytest_mistral_lora.formats.tool_calls import from_json


def _recognise(record: Mapping[str, Any], present: Collection[str]) -> Evidence | None:
    # `query` in ms-swift, `context` in Dolly
    instruction, given, output = (
        next((key for key in keys if key in present), "")
        for keys in (("instruction", "query"), ("input", "context"), ("output", "response"))
    )
    if not (instruction and output):
        return None
    named = {"instruction": instruction, "input": given, "output": output, "history": "history"}
    words = "/".join(filter(None, (instruction, given, output)))
    return Evidence(f"`{words}`", {name: key for name, key in named.items() if key in present})


def _convert(draft: Draft, reading: RecordReading) -> tuple[Draft, list[Change]]:
    changes: list[Change] = []
    history, draft = take(draft, "history", reading)
    history = from_json(history, changes, Place(reading.place, "history"))
    if not isinstance(history, Sequence | None) or isinstance(history, str):
        raise Place(reading.place, "history").error(f"is {kind_of(history)}", "a list of pairs")
    for index, pair in enumerate(history or ()):
        key = f"history[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise Place(reading.place, key).error(repr(pair), "a pair: a prompt and its answer")
        changes.append(changed("history"))
        for value, role in zip(pair, ("user", "assistant"), strict=True):
            draft, more = add_side(draft, key, value, role, reading)
            changes += more
    question, draft, more = take_joined(draft, "instruction", reading)
    changes += more
    draft, more = add_side(draft, reading.keys.get("instruction", "instruction"), question, "user", reading)
    changes += more
    output, draft = take(draft, "output", reading)
    draft, more = add_side(draft, reading.keys.get("output", "output"), output, "assistant", reading)
    return draft, changes + more


ALPACA = RowFormat(
    "alpaca",
    "Alpaca",
    {"instruction": "instruction", "input": "input", "output": "output", "history": "history"},
    _recognise,
    _convert,
)
