"""Rows that a tiny model learns by heart: texts of every kind, tool calls, and a character of several tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from golden_answers import TOOL

from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.training.generate.model_spec import record_rows
from pytest_mistral_lora.training.run import train


def asked(question: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


def called(city: str) -> dict[str, Any]:
    arguments = json.dumps({"city": city})
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "sunny"}
LEARNED: tuple[Mapping[str, Any], ...] = (
    asked("What is the capital of France?", "Paris."),
    asked("Hi", "Hello! How can I help?"),
    asked("Say it with an animal", "Of course 🦥 done"),
    asked("Write code", "def f(x):\n    return x + 1"),
    asked("  two leading spaces", "Seen."),
    asked("東京は?", "日本の首都です。"),
    asked("An object, please", '{"ok": true, "n": 3}'),
    {"messages": [{"role": "system", "content": "You are terse."}, *asked("Name a colour", "Blue")["messages"]]},
    {"messages": [*asked("My name is Ann", "Hello Ann")["messages"], *asked("Who am I?", "You are Ann.")["messages"]]},
    {"messages": [{"role": "user", "content": "How is the weather in Oslo?"}, called("Oslo")], "tools": [TOOL]},
    {
        "messages": [
            {"role": "user", "content": "Weather in Rome?"},
            called("Rome"),
            RESULT,
            {"role": "assistant", "content": "It is sunny in Rome."},
        ],
        "tools": [TOOL],
    },
)


def learn_by_heart(folder: Path, base: Path, learned: Sequence[Mapping[str, Any]] = LEARNED) -> Path:
    """Train an adapter of a base until it knows rows, record its answers in `answers`, and return its folder."""
    harness = TrainerHarness(folder, folder, "cpu")
    # the base of a tiny run is at its own place in the folder
    assert harness.base == base
    harness.rows.write_text("".join(json.dumps(row) + "\n" for row in learned), encoding="utf-8")
    train(harness.recipe(harness.adapter, steps=60, batch_size=len(learned)))
    rows = list(read_rows(harness.rows))
    record_rows(harness.adapter, rows, folder / "answers", base, max_new_tokens=64, device="cpu")
    return harness.adapter
