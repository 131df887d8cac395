from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralConfig, MistralForCausalLM

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.manifest import checks
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.adapter import peft_quiet

CASES = ["schema", "facts", "base", "base-config", "dataset", "declared", "restated", "files-listed"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("base") / "small"
    size = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1}
    config = MistralConfig(vocab_size=64, num_hidden_layers=1, architectures=["MistralForCausalLM"], **size)
    MistralForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """An adapter of another trainer: what PEFT saves, and nothing else."""
    with peft_quiet():
        model = get_peft_model(MistralForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    return tmp_path / "adapter"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    return tmp_path / "rows.jsonl"


def four_keys(folder: Path, weights: Path, rows: Path, **changes: Any) -> None:
    """Write a manifest of four keys, and the hash of a local base."""
    name = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    data = {"base": name, "revision": None, "dataset_sha256": sha256_file(rows), "seed": 1}
    data |= {"base_weights_sha256": BaseFolder(weights).weights_sha256, **changes}
    (folder / "manifest.json").write_text(json.dumps(data))


def judged(
    folder: Path, base: Path | None = None, rows: tuple[Path, ...] = (), *, require: bool = False
) -> dict[str, Result]:
    settings = Settings(20, None, "cpu", True, (), False, folder, require_manifest=require)
    target = AdapterTarget("adapter", folder, given=AdapterFolder(folder, base and BaseFolder(base)), dataset=rows)
    return {check.case: check.run() for check in checks(target, settings)}


def rules(results: dict[str, Result]) -> set[str]:
    return {finding.rule for result in results.values() for finding in result.findings}


def test_without_a_manifest_nothing_is_checked_and_nothing_is_wrong(folder: Path) -> None:
    results = judged(folder)
    assert list(results) == CASES
    assert {result.not_checked for result in results.values()} == {"no manifest.json"}
    assert rules(results) == set()
    assert rules(judged(folder, require=True)) == {"ML704"}


def test_a_manifest_of_four_keys_is_checked_as_far_as_it_goes(folder: Path, base: Path, rows: Path) -> None:
    four_keys(folder, base, rows)
    results = judged(folder, base, (rows,), require=True)
    assert rules(results) == set()
    assert {case for case, result in results.items() if result.not_checked} == {"facts", "base-config", "files-listed"}
    assert "not recorded" in results["facts"].not_checked
    assert "training" in dict(results["schema"].facts)["not recorded"]
    assert dict(results["base"].facts)["facts that match"] == 3


def test_what_is_not_at_hand_is_said(folder: Path, base: Path, rows: Path) -> None:
    four_keys(folder, base, rows, base="nowhere")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "nowhere"}))
    results = judged(folder)
    assert rules(results) == set()
    assert results["base"].not_checked == f"base_weights_sha256: {results['declared'].not_checked}"
    assert "'nowhere' is missing" in results["base"].not_checked
    assert results["dataset"].not_checked == "dataset_sha256: no dataset given"
    assert "--mistral-base" in results["declared"].not_checked


def test_another_base_or_dataset_than_the_recorded_one_is_found(folder: Path, base: Path, rows: Path) -> None:
    four_keys(folder, base, rows, base_weights_sha256="1" * 64)
    assert rules(judged(folder, base, (rows,))) == {"ML703"}
    four_keys(folder, base, rows, dataset_sha256="1" * 64)
    assert rules(judged(folder, base, (rows,))) == {"ML706"}


@pytest.mark.parametrize("revision", ["main", "v0.3", "e0bc86c", "0" * 40, "deadbeef" * 5, "E" * 40, "", 7])
def test_a_revision_that_is_no_commit_is_refused(revision: object, folder: Path, base: Path, rows: Path) -> None:
    four_keys(folder, base, rows, revision=revision)
    results = judged(folder, base, (rows,))
    assert rules(results) == {"ML701"}
    assert "$.revision" in str(results["schema"].findings[0].place)
    assert "not valid" in results["facts"].not_checked


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 200_000, b'{"base": "\\ud800"}', b"null"])
def test_a_file_that_is_no_manifest_is_a_finding_with_its_name(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    results = judged(folder)
    assert rules(results) == {"ML701"}
    assert str(folder / "manifest.json") in results["schema"].findings[0].text()


def test_a_pipe_or_gigabytes_in_place_of_a_manifest_are_not_read(folder: Path) -> None:
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2 << 30)
    assert "too large" in judged(folder)["schema"].findings[0].found
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    assert "not a regular file" in judged(folder)["schema"].findings[0].found


def test_a_damaged_configuration_beside_a_manifest_is_a_finding_and_no_hang(
    folder: Path, base: Path, rows: Path
) -> None:
    four_keys(folder, base, rows)
    config = folder / "adapter_config.json"
    config.unlink()
    os.mkfifo(config)
    assert rules(judged(folder, base, (rows,))) == {"ML703"}
    config.unlink()
    config.write_text("[" * 200_000)
    assert rules(judged(folder, base, (rows,))) == {"ML703"}
