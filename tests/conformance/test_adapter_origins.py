"""Whether an adapter is of the base that it is judged on, and of the last step of its run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.adapter.checkpoints import checkpoint_findings
from pytest_mistral_lora.conformance.adapter.named_base import named_base_findings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

TENSORS = "adapter_model.safetensors"


def named(folder: Path, name: Any, **base: Any) -> list[Finding]:
    given = folder / "given"
    given.mkdir()
    (given / "config.json").write_text(json.dumps({"model_type": "mistral", "vocab_size": 32768} | base))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    return list(named_base_findings(AdapterFolder(folder, BaseFolder(given))))


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("mistralai/Mistral-7B-Instruct-v0.3", {}),
        ("unsloth/mistral-7b-instruct-v0.2-bnb-4bit", {"vocab_size": 32000}),
        ("mistralai/Mistral-7B-v0.1", {"vocab_size": 32002}),
        ("mistralai/Mistral-Nemo-Instruct-2407", {"vocab_size": 131072}),
        ("mistralai/Mixtral-8x7B-v0.1", {"model_type": "mixtral", "vocab_size": 32000}),
        ("mistralai/Ministral-3-8B-Instruct-2512", {"model_type": "ministral3", "vocab_size": 131072}),
        (
            "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
            {"text_config": {"model_type": "mistral", "vocab_size": 131072}},
        ),
        ("/home/me/out/merged-step-2", {}),
        ("meta-llama/Llama-3.1-8B", {"model_type": "llama", "vocab_size": 128256}),
        ("", {}),
        (None, {}),
    ],
)
def test_a_base_that_fits_its_name_or_has_an_unknown_one_is_no_finding(
    name: Any, base: dict[str, Any], tmp_path: Path
) -> None:
    assert [finding.text() for finding in named(tmp_path, name, **base)] == []


@pytest.mark.parametrize(
    ("name", "base", "says"),
    [
        ("mistralai/Mistral-7B-v0.1", {}, "32,000 ids"),
        ("models\\Mistral-7B-Instruct-v0.3\\", {"vocab_size": 32000}, "32,768 ids"),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", {}, "a model of type mistral"),
        ("Qwen/Qwen3-8B", {}, "a model of type mistral"),
        ("google/gemma-2-9b", {}, "a model of type mistral"),
    ],
)
def test_a_name_of_another_base_is_a_note(name: str, base: dict[str, Any], says: str, tmp_path: Path) -> None:
    [finding] = named(tmp_path, name, **base)
    assert (finding.rule, finding.severity) == ("ML429", "note")
    assert says in finding.found


def run(folder: Path, step: int, *, top: int | None, best: str | None = None, apart: float = 3600) -> list[Finding]:
    """Judge an adapter with one checkpoint below it, which has other bytes and was written later."""
    last = folder / f"checkpoint-{step}"
    last.mkdir()
    (folder / TENSORS).write_bytes(b"a")
    (last / TENSORS).write_bytes(b"b")
    written = (folder / TENSORS).stat().st_mtime + apart
    os.utime(last / TENSORS, (written, written))
    (last / "trainer_state.json").write_text(json.dumps({"global_step": step, "best_model_checkpoint": best}))
    if top is not None:
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": top}))
    return list(checkpoint_findings(AdapterFolder(folder)))


@pytest.mark.parametrize(("top", "severity"), [(500, "error"), (None, "note")])
def test_a_later_checkpoint_is_found(top: int | None, severity: str, tmp_path: Path) -> None:
    [finding] = run(tmp_path, 1000, top=top)
    assert (finding.rule, finding.severity) == ("ML455", severity)


def test_an_adapter_of_the_last_step_or_of_the_same_minutes_is_sound(tmp_path: Path) -> None:
    for name, settings in {"end": {"top": 1000}, "copied": {"top": None, "apart": 60.0}}.items():
        (tmp_path / name).mkdir()
        assert run(tmp_path / name, 1000, **settings) == []


def test_an_adapter_that_is_the_last_checkpoint_is_sound(tmp_path: Path) -> None:
    run(tmp_path, 1000, top=500)
    (tmp_path / TENSORS).write_bytes(b"b")
    assert list(checkpoint_findings(AdapterFolder(tmp_path))) == []


def test_the_best_checkpoint_of_a_run_is_no_old_one(tmp_path: Path) -> None:
    assert run(tmp_path, 1000, top=500, best="out/checkpoint-500") == []
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / TENSORS).write_bytes(b"c")
    [finding] = checkpoint_findings(AdapterFolder(tmp_path))
    assert finding.rule == "ML455"


def test_a_folder_without_an_adapter_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / TENSORS).write_bytes(b"a")
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "checkpoint-x" / TENSORS).write_bytes(b"b")
    assert list(checkpoint_findings(AdapterFolder(tmp_path))) == []
