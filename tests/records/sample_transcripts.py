"""A valid transcript for the tests."""

from __future__ import annotations

import json
from typing import Any

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.records.transcripts import Transcript

ROW = {
    "messages": [
        {"role": "user", "content": "Capital of France?"},
        {"role": "assistant", "content": "Paris, é."},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}],
}


CITY = {"type": "string", "description": "Where?"}
UNIT = {"type": "string", "enum": ["C", "F"]}


def weather_row() -> dict[str, Any]:
    """A row with an ordinary tool: its keys stand in the order in which people write them, not in the alphabet's."""
    parameters = {"type": "object", "properties": {"unit": UNIT, "city": CITY}, "required": ["city"]}
    function = {"name": "weather", "description": "The weather.", "parameters": parameters}
    call = {"name": "weather", "arguments": {"unit": "C", "city": "Rome"}}
    return {
        "messages": [
            {"role": "user", "content": "Is it warm in Rome?"},
            {"role": "assistant", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": call}]},
            {"role": "tool", "tool_call_id": "abcdefghi", "content": "21"},
            {"role": "assistant", "content": "It is."},
        ],
        "tools": [{"type": "function", "function": function}],
    }


def reordered_parameters(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the keys of its tool's parameters sorted, as a version before wrote them into transcripts."""
    function = row["tools"][0]["function"]
    parameters = json.loads(json.dumps(function["parameters"], sort_keys=True))
    return row | {"tools": [{"type": "function", "function": function | {"parameters": parameters}}]}


def transcript(**changes: Any) -> Transcript:
    values: dict[str, Any] = {
        "case": "row-0001",
        "row": parse_row(ROW),
        "prompt_ids": (1, 3, 5, 4),
        "completion_ids": (7, 2),
        "text": "Pâris",
        "stop": "eos",
        "max_new_tokens": 8,
        "logprobs": (-0.25, -1e-06),
        "margins": (1.5, 9.0),
        "runner_up_ids": (9, 7),
        "checks": ({"name": "eos", "kind": "eos", "passed": True, "reason": ""},),
        "model": {
            "kind": "adapter",
            "tensors_sha256": "a" * 64,
            "base": "tiny",
            "revision": None,
            "base_weights_sha256": "b" * 64,
        },
        "tokenizer": {"backend": "mistral-common", "version": "v3", "file": "tokenizer.model.v3", "sha256": "c" * 64},
        "recorded_with": dict.fromkeys(("mistral-common", "peft", "tokenizers", "torch", "transformers"), "1.0"),
        "device": "cpu",
        "precision": "fp32",
    }
    return Transcript(**values | changes)
