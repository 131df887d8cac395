"""Ids that were recorded from published tokenizers of v7, v11 and v13, beside those of the derived files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import pytest
from derived_tekken import DERIVED, derived_oracle

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.records.goldens import goldens_folder

PUBLISHED = json.loads((goldens_folder() / "published.json").read_text(encoding="utf-8"))
TOKENIZERS: Mapping[str, Any] = PUBLISHED["tokenizers"]
CASES: Mapping[str, Any] = {case["case"]: case for case in PUBLISHED["cases"]}
TOOLS = "tool-round-trip"
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def with_all_words(name: str) -> Oracle:
    """Return the oracle of the derived file that has the version of a published tokenizer, and each of its words."""
    return derived_oracle(f"derived-{TOKENIZERS[name]['version']}", words=0)


def named(oracle: Oracle, ids: Iterable[int]) -> list[int | str]:
    """Return ids with control tokens by name, as they are recorded."""
    return [oracle.control_tokens.get(token_id, token_id) for token_id in ids]


def numbered(oracle: Oracle, recorded: Iterable[int | str]) -> list[int]:
    ids = {literal: token_id for token_id, literal in oracle.control_tokens.items()}
    return [ids[token] if isinstance(token, str) else token for token in recorded]


def texts(oracle: Oracle, recorded: Iterable[int | str]) -> list[str]:
    """Return recorded ids as control tokens, and the whole texts between them."""
    parts: list[str] = []
    for is_control, run in groupby(recorded, lambda token: isinstance(token, str)):
        parts += map(str, run) if is_control else [oracle.decode([int(token) for token in run])]
    return parts


@each_tokenizer
@pytest.mark.parametrize("case", CASES)
def test_the_ids_and_labels_of_a_published_tokenizer_are_those_of_the_derived_file(name: str, case: str) -> None:
    oracle, recorded = with_all_words(name), CASES[case]["recorded"][name]
    encoded = oracle.encode(CASES[case]["row"])
    assert encoded.labels is not None
    assert named(oracle, encoded.input_ids) == recorded["input_ids"]
    assert named(oracle, encoded.labels) == recorded["labels"]


@each_tokenizer
def test_a_derived_file_gives_the_markers_the_published_ids(name: str) -> None:
    numbers = {literal: token_id for token_id, literal in with_all_words(name).control_tokens.items()}
    recorded = TOKENIZERS[name]["control_ids"]
    assert {literal: numbers[literal] for literal in recorded} == recorded


@each_tokenizer
def test_a_file_of_another_version_gives_other_ids(name: str) -> None:
    recorded = CASES[TOOLS]["recorded"][name]["input_ids"]
    for other in TOKENIZERS.keys() - {name}:
        oracle = with_all_words(other)
        assert named(oracle, oracle.encode(CASES[TOOLS]["row"]).input_ids) != recorded, other


@each_tokenizer
@pytest.mark.parametrize("case", CASES)
def test_a_file_with_fewer_words_has_the_same_texts_between_the_same_markers(name: str, case: str) -> None:
    expected = texts(with_all_words(name), CASES[case]["recorded"][name]["input_ids"])
    of_version = [derived for derived, (version, _, _) in DERIVED.items() if version == TOKENIZERS[name]["version"]]
    for derived in of_version:
        oracle = derived_oracle(derived)
        encoded = oracle.encode(CASES[case]["row"])
        assert texts(oracle, named(oracle, encoded.input_ids)) == expected, derived


@each_tokenizer
def test_the_judge_finds_nothing_in_recorded_rows_and_one_fault_in_a_changed_one(name: str) -> None:
    oracle = with_all_words(name)
    for case in CASES.values():
        row, recorded = parse_row(case["row"]), case["recorded"][name]
        ids, labels = (numbered(oracle, recorded[key]) for key in ("input_ids", "labels"))
        assert [*row_findings(row, ids, labels, oracle)] == []
        unlearned = [*labels[:-1], -100]
        assert [finding.rule for finding in row_findings(row, ids, unlearned, oracle)] == ["ML546"]


def test_recorded_ids_have_control_tokens_by_name_alone() -> None:
    for case in CASES.values():
        assert case["recorded"].keys() == TOKENIZERS.keys()
        for name, recorded in case["recorded"].items():
            ids, known = recorded["input_ids"], TOKENIZERS[name]["control_ids"]
            assert all(token in known if isinstance(token, str) else token >= 1000 for token in ids)
            assert all(label in {-100, token} for token, label in zip(ids, recorded["labels"], strict=True))
