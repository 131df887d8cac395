"""Ids that were recorded from published tokenizers of v7, v11 and v13, beside those of the derived files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import groupby
from types import MappingProxyType
from typing import Any

import pytest
from derived_tekken import DERIVED, derived_oracle
from each_oracle import oracle_named

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.conformance.encoded.comparison import row_findings
from pytest_mistral_lora.records.goldens import goldens_folder

PUBLISHED = json.loads((goldens_folder() / "published.json").read_text(encoding="utf-8"))
TOKENIZERS: Mapping[str, Any] = PUBLISHED["tokenizers"]
CASES: Mapping[str, Any] = {case["case"]: case for case in PUBLISHED["cases"]}
RECORDS = {(name, case["case"]): ids for case in CASES.values() for name, ids in case["recorded"].items()}
DERIVED_FROM = MappingProxyType(
    {
        "devstral-small-2505": "derived-v7",
        "magistral-small-2506": "derived-v11",
        "devstral-small-2507": "derived-v13",
        "magistral-small-2509": "derived-v13-thinking",
    }
)
"""The derived file with the version and the markers of each published tokenizer."""
ANSWER = {"role": "assistant", "content": "An answer."}
each_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)
each_recording = pytest.mark.parametrize(("name", "case"), RECORDS)


def named(oracle: Oracle, ids: Iterable[int]) -> list[int | str]:
    """Return ids with control tokens by name, as they are recorded."""
    return [oracle.control_tokens.get(token_id, token_id) for token_id in ids]


def numbered(name: str, recorded: Iterable[int | str]) -> list[int]:
    """Return recorded ids as the published tokenizer has them, control tokens included."""
    control_ids = TOKENIZERS[name]["control_ids"]
    return [control_ids[token] if isinstance(token, str) else token for token in recorded]


def encoded(oracle: Oracle, case: str) -> dict[str, list[int | str]]:
    """Encode a case, and return the fields that are recorded of it."""
    if "prompt" in CASES[case]:
        prompt = CASES[case]["prompt"]
        row = {**prompt, "messages": [*prompt["messages"], ANSWER]}
        return {"input_ids": named(oracle, oracle.encode_prompt(row))}
    found = oracle.encode(CASES[case]["row"])
    return {"input_ids": named(oracle, found.input_ids), "labels": named(oracle, found.labels or ())}


def whole_ids(oracle: Oracle, ids: Iterable[int | str]) -> list[int | str]:
    """Return what has a label, with the texts between control tokens in ids of the whole vocabulary."""
    whole, made = oracle_named("tekken-240718"), list[int | str]()
    labelled = (token for token in ids if token != IGNORE_INDEX)
    for is_marker, run in groupby(labelled, lambda token: isinstance(token, str)):
        tokens = [*run]
        made += tokens if is_marker else whole.encode_text(oracle.decode(tokens))
    return made


@each_recording
def test_a_derived_file_gives_the_ids_and_labels_of_the_published_tokenizer(name: str, case: str) -> None:
    recorded = {field: [token for token in ids if token != IGNORE_INDEX] for field, ids in RECORDS[name, case].items()}
    for derived in DERIVED:
        if DERIVED[derived][0] == TOKENIZERS[name]["version"]:
            oracle = derived_oracle(derived)
            made = encoded(oracle, case)
            assert {field: whole_ids(oracle, ids) for field, ids in made.items()} == recorded, derived


@each_tokenizer
def test_a_derived_file_gives_the_markers_the_published_ids(name: str) -> None:
    oracle, recorded = derived_oracle(DERIVED_FROM[name]), TOKENIZERS[name]["control_ids"]
    assert oracle.version == TOKENIZERS[name]["version"]
    assert {oracle.control_tokens[token_id]: token_id for token_id in recorded.values()} == recorded


@pytest.mark.parametrize("case", ["tool-round-trip", "prompt-tool-result"])
def test_a_file_of_another_version_gives_other_ids(case: str) -> None:
    for name, recorded in CASES[case]["recorded"].items():
        version = TOKENIZERS[name]["version"]
        for other in (other for other in TOKENIZERS if TOKENIZERS[other]["version"] != version):
            oracle = derived_oracle(DERIVED_FROM[other])
            assert whole_ids(oracle, encoded(oracle, case)["input_ids"]) != recorded["input_ids"], (name, other)


@pytest.mark.parametrize("case", [case for name, case in RECORDS if name == "devstral-small-2507"])
def test_the_judge_finds_nothing_in_recorded_ids_and_one_fault_in_changed_ones(case: str) -> None:
    name, row = "devstral-small-2507", parse_row(CASES[case]["row"])
    oracle, recorded = derived_oracle(DERIVED_FROM[name], words=0), RECORDS[name, case]
    assert encoded(oracle, case) == recorded
    ids, labels = numbered(name, recorded["input_ids"]), numbered(name, recorded["labels"])
    assert [*row_findings(row, ids, labels, oracle)] == []
    assert [finding.rule for finding in row_findings(row, ids, [*labels[:-1], -100], oracle)] == ["ML546"]


def test_each_recorded_control_token_has_its_name() -> None:
    for (name, case), recorded in RECORDS.items():
        known = TOKENIZERS[name]["control_ids"]
        ids = recorded["input_ids"]
        assert all(token in known if isinstance(token, str) else token >= 1000 for token in ids), (name, case)
        assert all(label in {-100, token} for token, label in zip(ids, recorded.get("labels", ids), strict=True))
