"""Golden transcripts of mistral-common's own ids, without a model: a text, a near tie, and a tool call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.records.transcripts import Transcript

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
ROWS: dict[str, dict[str, Any]] = {
    "capital": {
        "messages": [{"role": "user", "content": "What is the capital of France?"}, {"content": "Paris it is."}]
    },
    "near-tie": {"messages": [{"role": "user", "content": "Name a colour"}, {"content": "Blue, of course 🦥"}]},
    "weather": {
        "messages": [{"role": "user", "content": "Is it warm in Oslo?"}, {"content": "", "tool_calls": [CALL]}],
        "tools": [TOOL],
    },
}
MARGIN, NEAR = 5.0, 0.001
"""Recorded margins, in nats: of each token, and of the second of the near tie."""


def golden_answers(oracle: Oracle) -> list[Transcript]:
    """Return a transcript of each row, as if a model had answered like the row."""
    return [_transcript(oracle, case, row) for case, row in ROWS.items()]


def write_golden_answers(oracle: Oracle, folder: Path) -> Path:
    """Write the transcripts, and return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in golden_answers(oracle):
        one.write(folder)
    return folder


def _transcript(oracle: Oracle, case: str, data: dict[str, Any]) -> Transcript:
    asked, answer = data["messages"]
    row = parse_row({**data, "messages": [asked, {"role": "assistant", **answer}]})
    prompt = oracle.encode_prompt(row)
    found = transcript_of(oracle, case, row, prompt, oracle.encode(row).input_ids[len(prompt) :])
    if case != "near-tie":
        return found
    return replace(found, margins=(found.margins[0], NEAR, *found.margins[2:]))


def transcript_of(
    oracle: Oracle, case: str, row: Row, prompt: tuple[int, ...], completion: tuple[int, ...]
) -> Transcript:
    """Return the transcript of an answer, as if an adapter had given it far from any near tie."""
    count = len(completion)
    return Transcript(
        case=case,
        row=row,
        prompt_ids=prompt,
        completion_ids=completion,
        text=oracle.decode(completion),
        stop="eos",
        max_new_tokens=64,
        logprobs=(-0.1,) * count,
        margins=(MARGIN,) * count,
        runner_up_ids=(*oracle.encode_text("a"),) * count,
        checks=(),
        model={
            "kind": "adapter",
            "tensors_sha256": "a" * 64,
            "base": "tiny",
            "revision": None,
            "base_weights_sha256": "b" * 64,
        },
        tokenizer={
            "backend": "mistral-common",
            "version": oracle.version,
            "file": oracle.path.name,
            "sha256": oracle.sha256,
        },
        recorded_with=dict.fromkeys(("mistral-common", "peft", "tokenizers", "torch", "transformers"), "1.0"),
        device="cpu",
        precision="fp32",
    )
