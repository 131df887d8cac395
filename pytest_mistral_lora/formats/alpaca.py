"""Alpaca: an instruction with an optional input and its output, perhaps after rounds of `history`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pytest_mistral_lora.formats.drafts import Draft, RecordReading, add_history, add_side, take, take_joined
from pytest_mistral_lora.formats.report import Change
from pytest_mistral_lora.formats.row_format import Evidence, RowFormat


def _recognise(record: Mapping[str, Any], present: Collection[str]) -> Evidence | None:
    # `query` and `context` are the names of other data sets for the same fields
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
    draft, changes = add_history(draft, reading)
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
