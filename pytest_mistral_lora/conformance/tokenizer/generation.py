"""`generation_config.json`: the tokens that `generate` forbids or forces, and the settings that change every answer.

The keys are those of transformers' `GenerationConfig`; servers read most of them from the same file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import shortened
from pytest_mistral_lora.places import Place

SHORTEST = 256
"""Tokens of prompt and answer together below which `max_length` cuts usual answers; transformers 4 had 20."""

_NEUTRAL: Mapping[str, float] = {
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "min_length": 0,
    "min_new_tokens": 0,
}
"""Settings that change a greedy answer, each with the value that does not."""

_SET_AT_ALL = ("exponential_decay_length_penalty", "sequence_bias", "watermarking_config", "forced_eos_token_id")


def generation_findings(config: Mapping[str, Any], ends: Set[int], place: Place) -> Iterator[Finding]:
    """Yield ML240 if a generation configuration keeps a model from ending, and ML241 if it changes its answers.

    Args:
        config: The object of `generation_config.json`.
        ends: The ids of EOS.
        place: The path of the file.
    """
    shown = ", ".join(map(str, sorted(ends)))
    if ends and config.get("eos_token_id") in (None, []):
        yield Finding("ML240", "eos_token_id is missing: no token ends an answer", place, shown)
    for key in ("suppress_tokens", "bad_words_ids"):
        forbidden = ends & _last_ids(config.get(key))
        if forbidden:
            yield Finding("ML240", f"{key} forbids EOS (id {min(forbidden)})", place, f"{key} without it")
    if config.get("forced_bos_token_id") is not None:
        found = f"forced_bos_token_id is {shortened(config['forced_bos_token_id'])}: every answer begins with this id"
        yield Finding("ML240", found, place, "no such key")
    yield from _changed_answers(config, ends, place)


def _last_ids(value: Any) -> set[int]:
    """Return the ids of a list, and the last id of each list within it: the earlier ones are only its context."""
    entries = value if isinstance(value, list) else [value]
    last = [entry[-1] if isinstance(entry, list) and entry else entry for entry in entries]
    return {token for token in last if type(token) is int}


def _changed_answers(config: Mapping[str, Any], ends: Set[int], place: Place) -> Iterator[Finding]:
    for key, neutral in _NEUTRAL.items():
        value = config.get(key)
        if value is not None and value != neutral:
            yield Finding("ML241", f"{key} is {shortened(value)}", place, f"{neutral:g}, or no such key")
    for key in _SET_AT_ALL:
        if config.get(key) is not None:
            yield Finding("ML241", f"{key} is {shortened(config[key])}", place, "no such key")
    if ends & _last_ids(config.get("begin_suppress_tokens")):
        yield Finding("ML241", "begin_suppress_tokens has EOS: no answer is empty", place, "the list without it")
    for key, counted in (("max_length", "prompt and answer"), ("max_new_tokens", "an answer")):
        most = config.get(key)
        if type(most) is int and most < SHORTEST:
            found = f"{key} is {most}, the most tokens of {counted}"
            yield Finding("ML241", found, place, "no such key: the caller chooses the length")
