"""The named deviations that a running server shows, on the smallest row of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.server.deviations import PromptDeviations
from pytest_mistral_lora.conformance.server_target import AskedRow, ServerTarget
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.serving.server import ServedPrompt

SEEN = {
    "spm-v3": "assistant-trailing-spaces control-literal empty-message-joined empty-text-space system-between-users "
    "tool-result-as-string unequal-weights-merged",
    "spm-v7": "assistant-trailing-spaces control-literal empty-message-joined empty-text-space no-space-after-system "
    "unequal-weights-merged",
    "derived-v11": "assistant-trailing-spaces control-literal empty-message-joined tool-results-out-of-order "
    "unequal-weights-merged",
}
"""The named deviations of llama.cpp's prompts, by tokenizer. vLLM has them, too, and does not write tools anew."""


def asked_examples(target: ServerTarget) -> list[AskedRow]:
    """Return the smallest row of each named deviation of a tokenizer, but for those that mistral-common refuses.

    It has a turn more than in the table, so that the deviation is in a prompt.
    """
    oracle = target.oracle
    rows = {
        one.id: as_row({**one.example, "messages": [*one.example["messages"], *_more(one.example["messages"][-1])]})
        for one in DEVIATIONS
        if oracle.facts in one.versions and oracle.kind in one.kinds
    }
    asked = replace(target, given=tuple(rows.values())).asked_rows()
    named = (replace(one, name=name) for name, one in zip(rows, asked, strict=True))
    return [one for one in named if one.expected is not None]


def _more(last: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages that may follow an answer: the results of its calls, or a question, and another answer."""
    results = [
        {"role": "tool", "tool_call_id": call.get("id", ""), "name": call["function"]["name"], "content": "ok"}
        for call in last.get("tool_calls", ())
    ]
    return [*(results or [{"role": "user", "content": "c"}]), {"role": "assistant", "content": "d"}]


def seen_deviations(kind: str, address: str, tokenizer: CheckpointTokenizer, version: str = "") -> set[str]:
    """Return the names of the deviations that explain a prompt of a server; a prompt that none explains fails."""
    judge = Target.of_loaded(tokenizer)
    target = ServerTarget("served", judge=judge, kind=kind, url=address, version=version)
    answered = replace(target, given=tuple(one.row for one in asked_examples(target))).answers.rows
    named, seen = PromptDeviations(target), set[str]()
    for one in answered:
        prompt = one.served
        assert isinstance(prompt, ServedPrompt), one.row
        if prompt.ids is not None and one.expected is not None and prompt.ids != one.expected:
            explained = named.explain(one, prompt.ids)
            assert explained, one.row
            seen.update(explained)
    return seen
