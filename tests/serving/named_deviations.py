"""The named deviations that a running server shows, on the smallest row of each."""

from __future__ import annotations

from dataclasses import replace

from boards.prompts import asked_examples

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.server.deviations import PromptDeviations
from pytest_mistral_lora.conformance.server_target import ServerTarget
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
