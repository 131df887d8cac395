"""Runs and adapters that are broken on purpose, each with the rule that must catch it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance import tiny_run as module
from pytest_mistral_lora.conformance import train as subject
from pytest_mistral_lora.conformance.adapter import adapter_findings
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.conformance.tiny_run import TinyRun, largest_ignored_gradient, tiny_run
from pytest_mistral_lora.training.data import PadRight, RowDataset
from pytest_mistral_lora.training.loop import supervised_losses
from pytest_mistral_lora.training.run import RunResult

pytestmark = pytest.mark.mistral_training

CHECKS: dict[str, Callable[[TinyRun], Iterator[Finding]]] = {
    "ML301": subject._learned,
    "ML302": subject._only_lora,
    "ML303": subject._every_layer,
    "ML304": subject._loss_fell,
    "ML305": subject._reloaded,
    "ML306": subject._ignored_gradient,
    "ML307": subject._seeds,
    "ML702": subject._manifest,
}


@pytest.fixture(scope="module")
def run_and_result(tmp_path_factory: pytest.TempPathFactory) -> tuple[TinyRun, RunResult]:
    """The tiny run, with the model that is still in memory."""
    results: list[RunResult] = []
    with pytest.MonkeyPatch.context() as patch:
        keep = module._changed_base_tensors
        patch.setattr(module, "_changed_base_tensors", lambda result: (results.append(result), keep(result))[1])
        run = tiny_run(Oracle(shipped_tokenizer("spm-v3")), tmp_path_factory.mktemp("run"), device="cpu")
    return run, results[0]


@pytest.fixture(scope="module")
def run(run_and_result: tuple[TinyRun, RunResult]) -> TinyRun:
    return run_and_result[0]


@pytest.fixture(scope="module")
def result(run_and_result: tuple[TinyRun, RunResult]) -> RunResult:
    return run_and_result[1]


@pytest.fixture
def copy(run: TinyRun, tmp_path: Path) -> TinyRun:
    """A copy of the run's files to break."""
    return dataclasses.replace(run, folder=Path(shutil.copytree(run.folder, tmp_path / "copy")))


def smoked(run: TinyRun) -> TinyRun:
    """The run as a new process sees it now."""
    return dataclasses.replace(run, smoke=module._in_a_new_process(run.folder, "cpu"))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize("rule", CHECKS)
def test_the_run_as_it_is_breaks_no_rule(rule: str, run: TinyRun) -> None:
    assert list(CHECKS[rule](run)) == []


def test_the_adapter_as_it_is_breaks_no_rule(run: TinyRun) -> None:
    assert list(adapter_findings(run.adapter, run.base)) == []
    assert list(adapter_findings(run.adapter)) == []


def test_a_zeroed_layer_is_caught(copy: TinyRun) -> None:
    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in sorted(tensors) if ".lora_B." in name)].zero_()

    change_tensors(copy.adapter / "adapter_model.safetensors", zero)
    assert [finding.rule for finding in adapter_findings(copy.adapter, copy.base)] == ["ML403"]
    assert "ML305" in {finding.rule for finding in subject._reloaded(smoked(copy))}
    assert "ML702" in {finding.rule for finding in subject._manifest(copy)}


def drop_one(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[min(tensors)]


def rename_all(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.replace("model.layers", "language_model.layers")] = tensors.pop(name)


def add_one(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)


def drop_all(tensors: dict[str, torch.Tensor]) -> None:
    tensors.clear()


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors[min(tensors)][0, 0] = float("nan")


def another_rank(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = (tensor[:4] if ".lora_A." in name else tensor[:, :4]).contiguous()


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (drop_one, "ML401"),
        (rename_all, "ML401"),
        (add_one, "ML401"),
        (drop_all, "ML401"),
        (not_a_number, "ML402"),
        (another_rank, "ML404"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_broken_tensors_are_caught(change: Callable[[Any], None], rule: str, copy: TinyRun) -> None:
    change_tensors(copy.adapter / "adapter_model.safetensors", change)
    assert {finding.rule for finding in adapter_findings(copy.adapter, copy.base)} == {rule}


def test_an_edited_scale_is_caught(copy: TinyRun) -> None:
    file = copy.adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 8}))
    assert "ML305" in {finding.rule for finding in subject._reloaded(smoked(copy))}
    assert "ML702" in {finding.rule for finding in subject._manifest(copy)}


def test_a_changed_base_is_caught(copy: TinyRun, result: RunResult) -> None:
    change_tensors(copy.base / "model.safetensors", lambda tensors: tensors["lm_head.weight"][0].add_(1e-3))
    changed = module._changed_base_tensors(dataclasses.replace(result, base_folder=copy.base))
    assert changed == ["lm_head.weight"]
    broken = dataclasses.replace(copy, evidence={**copy.evidence, "changed_base_tensors": changed})
    assert [finding.rule for finding in subject._only_lora(broken)] == ["ML302"]
    assert "ML702" in {finding.rule for finding in subject._manifest(copy)}


def test_a_layer_that_did_not_move_is_caught(run: TinyRun, result: RunResult) -> None:
    name = max(result.adapter.tensors)
    still = dataclasses.replace(result.adapter, initial={**result.adapter.initial, name: result.adapter.tensors[name]})
    unmoved = module._unmoved_layers(dataclasses.replace(result, adapter=still))
    assert unmoved == [name]
    broken = dataclasses.replace(run, evidence={**run.evidence, "unmoved_layers": unmoved})
    assert [finding.rule for finding in subject._every_layer(broken)] == ["ML303"]


def test_a_loss_that_stays_is_caught(run: TinyRun) -> None:
    losses = run.evidence["losses"]
    broken = dataclasses.replace(run, evidence={**run.evidence, "losses": [losses[0]] * len(losses)})
    assert [finding.rule for finding in subject._loss_fell(broken)] == ["ML304"]


def test_another_answer_than_the_one_learned_is_caught(copy: TinyRun) -> None:
    copy.rows.write_text(copy.rows.read_text().replace("Paris.", "Lyon."))
    assert [finding.rule for finding in subject._learned(smoked(copy))] == ["ML301"]
    assert "ML702" in {finding.rule for finding in subject._manifest(copy)}


def unshifted_losses(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
    """A loss that forgets that position n predicts token n + 1."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    chosen = batch["labels"] != IGNORE_INDEX
    return torch.nn.functional.cross_entropy(logits[chosen], batch["labels"][chosen], reduction="none"), None


def losses_of_everything(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
    """A loss that ignores the mask."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none"
    ), None


@pytest.mark.parametrize("losses", [unshifted_losses, losses_of_everything])
def test_a_loss_on_other_tokens_is_caught(losses: Any, run: TinyRun, result: RunResult) -> None:
    dataset = RowDataset(result.data.train.encoded)
    batch = PadRight(0)([dataset[index] for index in range(len(dataset))])
    assert largest_ignored_gradient(supervised_losses, result.model, batch) == 0.0
    largest = largest_ignored_gradient(losses, result.model, batch)
    assert largest > 0
    broken = dataclasses.replace(run, evidence={**run.evidence, "ignored_gradient": largest})
    assert [finding.rule for finding in subject._ignored_gradient(broken)] == ["ML306"]


def test_a_seed_that_decides_nothing_is_caught(run: TinyRun) -> None:
    seeds = run.evidence["seeds"]
    for wrong in ({**seeds, "again": seeds["other"]}, {**seeds, "other": seeds["first"]}):
        broken = dataclasses.replace(run, evidence={**run.evidence, "seeds": wrong})
        assert [finding.rule for finding in subject._seeds(broken)] == ["ML307"]


def test_a_flipped_bit_in_any_recorded_file_is_caught(copy: TinyRun) -> None:
    files = json.loads((copy.adapter / "manifest.json").read_text())["files"]
    assert {"adapter_model.safetensors", "adapter_config.json", "DECISION.md"} <= set(files)
    for name in files:
        file = copy.adapter / name
        before = file.read_bytes()
        file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert any(name in finding.place for finding in subject._manifest(copy)), name
        file.write_bytes(before)
    assert list(subject._manifest(copy)) == []
