"""Settings of `generation_config.json`: which of them keep a model from ending, and which change its answers."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_mistral_lora.conformance.tokenizer.generation import SHORTEST, generation_findings

EOS = 2


def found(**config: Any) -> list[tuple[str, str]]:
    findings = generation_findings({"eos_token_id": EOS} | config, {EOS}, "generation_config.json")
    return [(finding.rule, finding.found.partition(" ")[0]) for finding in findings]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eos_token_id", None),
        ("eos_token_id", []),
        ("suppress_tokens", [7, EOS]),
        ("bad_words_ids", [[EOS]]),
        ("bad_words_ids", [[7], [9, EOS]]),
        ("forced_bos_token_id", 1),
    ],
)
def test_a_setting_that_keeps_a_model_from_ending_is_an_error(key: str, value: Any) -> None:
    assert found(**{key: value}) == [("ML240", key)]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("repetition_penalty", 1.05),
        ("no_repeat_ngram_size", 3),
        ("min_new_tokens", 1),
        ("presence_penalty", "high"),
        ("sequence_bias", [[[7], -1.0]]),
        ("begin_suppress_tokens", [EOS]),
        ("forced_eos_token_id", EOS),
        ("max_length", 20),
        ("max_new_tokens", SHORTEST - 1),
    ],
)
def test_a_setting_that_changes_answers_is_a_note(key: str, value: Any) -> None:
    assert found(**{key: value}) == [("ML241", key)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"do_sample": True, "temperature": 0.15, "top_p": 0.9},
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0},
        {"suppress_tokens": [7], "bad_words_ids": [[EOS, 7]], "begin_suppress_tokens": None},
        {"max_length": SHORTEST, "max_new_tokens": 4096},
        {"suppress_tokens": {"2": 2}, "bad_words_ids": "2"},
    ],
)
def test_other_settings_are_no_finding(config: dict[str, Any]) -> None:
    assert found(**config) == []
