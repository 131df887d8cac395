"""Whether positions matter is read from the model's own configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tokenizer_folder import TokenizerFiles
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.encoded.packing import PLAIN_ROPE, PositionScaling
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.formats.row_sources import FileRows

ROWS = [
    {"messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]},
    {"messages": [{"role": "user", "content": "And three?"}, {"role": "assistant", "content": "Five, I think."}]},
]
PLAIN: list[Any] = [
    {"model_type": "mistral", "rope_theta": 1e6},
    {"model_type": "mistral", "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"model_type": "mistral", "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 4}},
    {"model_type": "mistral3", "text_config": {"model_type": "mistral"}},
    {"model_type": "ministral3", "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
    {"model_type": "mistral", "rope_parameters": "odd", "text_config": 3},
    [],
    "text",
]
SCALED: list[Any] = [
    ({"model_type": "ministral3"}, "llama_4_scaling_beta", 16384),
    ({"model_type": "mistral3", "text_config": {"model_type": "mistral4"}}, "llama_4_scaling_beta", 8192),
    (
        {"model_type": "x", "rope_parameters": {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}},
        "llama_4_scaling_beta",
        8,
    ),
    (
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 9},
        "rope_type dynamic",
        9,
    ),
    (
        {"rope_parameters": {"full_attention": {"rope_type": "longrope", "original_max_position_embeddings": 7}}},
        "rope_type longrope",
        7,
    ),
]


def write_config(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("config", PLAIN)
def test_plain_rope_sees_differences_alone(config: Any, tmp_path: Path) -> None:
    scaling = PositionScaling.of_files(TokenizerFiles(write_config(tmp_path, config)))
    assert not scaling.key
    assert not scaling.matters(range(10**6))


@pytest.mark.parametrize(("config", "key", "limit"), SCALED)
def test_a_model_that_scales_by_the_position_is_known_by_its_configuration(
    config: Any, key: str, limit: int, tmp_path: Path
) -> None:
    scaling = PositionScaling.of_files(TokenizerFiles(write_config(tmp_path, config)))
    assert (scaling.key, scaling.limit) == (key, limit)
    assert scaling.matters([limit])
    assert not scaling.matters([limit - 1])


def test_without_a_configuration_plain_rope_is_assumed_and_reported(tmp_path: Path) -> None:
    assert PositionScaling.of_files(TokenizerFiles(tmp_path)) == PLAIN_ROPE
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read" in PositionScaling.of_files(TokenizerFiles(tmp_path / "tekken.json")).source


def packed(tmp_path: Path, **change: Any) -> Path:
    """A file of one packed sequence whose mask numbers the conversations, and whose positions run on."""
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    parts = [oracle.encode(row) for row in ROWS]
    line = {
        "conversations": [row["messages"] for row in ROWS],
        "input_ids": [token for part in parts for token in part.input_ids],
        "labels": [label for part in parts for label in part.labels or ()],
        "attention_mask": [n for n, part in enumerate(parts, 1) for _ in part.input_ids],
    }
    file = tmp_path / "encoded.jsonl"
    file.write_text(json.dumps(line | {"position_ids": list(range(len(line["input_ids"])))} | change) + "\n")
    return file


def judged(file: Path, base: Path | None = None) -> tuple[list[Finding], int]:
    """The findings of a file, and the number of its sequences whose positions run on without harm."""
    files = None if base is None else TokenizerFiles(base)
    audit = Audit(FileRows(file), Oracle(shipped_tokenizer("spm-v3")), base=files)
    findings = [finding for verdict in audit.verdicts() for finding in verdict.findings]
    return findings, audit.totals.figures.run_on


def test_positions_that_run_on_are_an_error_only_if_the_model_scales_by_them(tmp_path: Path) -> None:
    file = packed(tmp_path)
    assert judged(file) == ([], 1)
    rope = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    [error], count = judged(file, write_config(tmp_path, {"model_type": "ministral3", "rope_parameters": rope}))
    assert (error.rule, error.severity, count) == ("ML512", "error", 0)
    assert "(llama_4_scaling_beta)" in error.found
    far = rope | {"original_max_position_embeddings": 4096}
    assert judged(file, write_config(tmp_path, {"model_type": "ministral3", "rope_parameters": far})) == ([], 1)
    # one mask for all conversations: they see each other, however the model uses positions
    ones = {"attention_mask": [1] * len(json.loads(file.read_text())["input_ids"])}
    assert {finding.rule for finding in judged(packed(tmp_path, **ones))[0]} == {"ML512", "ML513"}
    assert {finding.rule for finding in judged(packed(tmp_path, attention_mask=None))[0]} == {"ML512"}
