"""The trial of a GPU: its runs and measurements work on a CPU, and its verdicts find what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import recipe_data, write_rows
from torch.utils.flop_counter import FlopCounterMode

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.cli import gpu_trial as front
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.cli.gpu_trial import GUARDED, trials_of_a_gpu
from pytest_mistral_lora.guarding import tiny_run
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.training.gpu_trial import child
from pytest_mistral_lora.training.gpu_trial.reference import RecordedRuns, recorded, versions
from pytest_mistral_lora.training.gpu_trial.report import JSON, PAGE, GpuReport
from pytest_mistral_lora.training.gpu_trial.shape import (
    MEASURED,
    SEVEN_B,
    WARM,
    Shape,
    ShapeResult,
    measure,
    operations_of_a_step,
)
from pytest_mistral_lora.training.gpu_trial.trials import STEPS, TRIALS, Trial, TrialResult, Trials, judge
from pytest_mistral_lora.training.layers import planned_layers
from pytest_mistral_lora.training.recipe import Lora

BY_NAME = {trial.name: trial for trial in TRIALS}
FALLING = [4 - 0.2 * step for step in range(STEPS)]
SMALL = Shape(
    {
        **SEVEN_B.config,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 500,
    },
    64,
)


def evidence(**changes: Any) -> Mapping[str, Any]:
    found = {"losses": FALLING, "gradient_norms": [1.0] * STEPS, "peak_bytes": 10, "seconds": 1.0}
    return {**found, **changes}


def moved(by: float, at: int = 3, values: list[float] = FALLING) -> list[float]:
    return [one + by * (step == at) for step, one in enumerate(values)]


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("fp32", {}, ""),
        ("fp32", {"losses": moved(0.0005)}, ""),
        ("fp32", {"losses": moved(0.01)}, "a loss differs by 0.01 nats"),
        ("bf16", {"losses": moved(0.01)}, ""),
        # bf16 on the CPU is 0.02 nats away: three times as much is rounding
        ("bf16", {"losses": moved(0.05)}, ""),
        ("bf16", {"losses": moved(0.07)}, "rounding explains 0.06"),
        ("rows alone", {"losses": moved(-0.2)}, "a loss differs by 0.2 nats"),
        ("fp32", {"gradient_norms": [1.0] * (STEPS - 1) + [1.05]}, "a gradient's norm differs by 5.0%"),
        ("bf16", {"gradient_norms": [1.0] * (STEPS - 1) + [1.05]}, ""),
        ("fp16", {"losses": moved(float("nan"))}, "each must be finite"),
        ("fp16", {"gradient_norms": moved(float("inf"))}, "each must be finite"),
        ("fp16", {"losses": FALLING[1:]}, f"{STEPS - 1} of {STEPS} steps"),
        # other layers than those of the run on the CPU: the loss falls
        ("nf4", {"losses": moved(0.5)}, ""),
        ("nf4", {"losses": FALLING[::-1]}, "does not fall"),
    ],
)
def test_a_run_that_rounding_does_not_explain_has_failed(name: str, changes: dict[str, Any], reason: str) -> None:
    in_bf16 = evidence(losses=moved(0.02))
    found = judge(BY_NAME[name], evidence(**changes), evidence(), in_bf16)
    assert (found.outcome == "failed") is bool(reason)
    assert reason in found.reason


@pytest.mark.parametrize(("by", "is_failed"), [(0.0, False), (0.01, False), (0.1, True)])
def test_a_resumed_run_is_compared_with_the_whole_one(by: float, is_failed: bool) -> None:
    # however far the CPU is
    far = evidence(losses=moved(2.0))
    found = judge(BY_NAME["resumed"], evidence(losses=moved(by)), far, far, uninterrupted=evidence())
    assert (found.outcome == "failed") is is_failed


@pytest.mark.parametrize(
    ("name", "machine", "reason"),
    [
        ("bf16", {"has_bf16": False}, "does not compute in bf16"),
        ("fp16", {"has_bf16": False}, ""),
        ("DDP", {"devices": 1}, "there is one GPU"),
        ("DDP", {"devices": 2}, ""),
        ("fp16", {"device": "cpu"}, "it needs a GPU"),
    ],
)
def test_what_a_machine_lacks_is_not_checked(name: str, machine: dict[str, Any], reason: str) -> None:
    lacks = BY_NAME[name].lacks(**{"device": "cuda", "devices": 2, "has_bf16": True, **machine})
    assert reason in lacks
    assert bool(lacks) is bool(reason)


def test_a_package_that_is_missing_is_named() -> None:
    missing = replace(BY_NAME["nf4"], package="no_such_package")
    assert missing.lacks("cuda", 2, has_bf16=True) == "no_such_package is not installed"


def test_a_run_writes_its_evidence_and_goes_on_after_a_stop(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "rows.jsonl")
    found = []
    for output, calls in (("whole", [[]]), ("resumed", [["--stop-after-a-step"], ["--resume"]])):
        file, written = tmp_path / f"{output}.json", tmp_path / f"{output}-evidence.json"
        data = recipe_data(base, training={"steps": 3, "logging_steps": 1})
        file.write_text(json.dumps({**data, "output": output}))
        for words in calls:
            monkeypatch.setattr("sys.argv", ["child", str(file), str(written), *words])
            child.main()
            assert written.exists() is ("--stop-after-a-step" not in words)
        found.append(json.loads(written.read_text()))
    whole, resumed = found
    assert len(whole["losses"]) == len(whole["gradient_norms"]) == 3
    assert whole["losses"] == resumed["losses"]


def tried(folder: Path, *chosen: Trial, reference: RecordedRuns | None = None) -> list[TrialResult]:
    trials = Trials(folder, device="cpu", devices=1, has_bf16=True, reference=reference)
    return [trials.run(trial) for trial in chosen]


def of_this_machine() -> RecordedRuns:
    """The record, as if the libraries here had made it."""
    return replace(recorded(), versions=versions())


@pytest.mark.slow
def test_the_record_is_what_a_cpu_computes(tmp_path: Path) -> None:
    """Within what other instructions and other libraries round; a change of the tiny run moves a loss by more."""
    found = Trials(tmp_path, device="cpu", devices=0, has_bf16=True).record()
    assert found.base_weights_sha256 == recorded().base_weights_sha256
    assert found.runs.keys() == recorded().runs.keys()
    for precision, (nats, relative) in {"fp32": (1e-4, 1e-4), "bf16": (0.02, 0.03), "fp16": (0.005, 0.01)}.items():
        run, expected = found.runs[precision], recorded().runs[precision]
        assert run["losses"] == pytest.approx(expected["losses"], abs=nats), precision
        assert run["gradient_norms"] == pytest.approx(expected["gradient_norms"], rel=relative), precision


def test_the_record_tells_its_precisions_apart() -> None:
    losses = {precision: run["losses"] for precision, run in recorded().runs.items()}
    assert all(len(run) == STEPS and run[-1] < run[0] - 1 for run in losses.values())
    far = {one: max(abs(a - b) for a, b in zip(losses[one], losses["fp32"], strict=True)) for one in ("bf16", "fp16")}
    assert 0 < far["fp16"] < far["bf16"] < 0.1


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({}, ()),
        ({"versions": {**versions(), "torch": "1.0"}}, (f"torch {versions()['torch']} (recorded with 1.0)",)),
        ({"base_weights_sha256": "0" * 64}, ("other weights of the tiny base",)),
    ],
)
def test_what_differs_from_the_record_is_named(change: dict[str, Any], differences: tuple[str, ...]) -> None:
    reference = replace(of_this_machine(), **change)
    assert reference.differences(recorded().base_weights_sha256) == differences


@pytest.mark.slow
def test_a_run_is_compared_with_the_record_or_with_what_is_computed_here(tmp_path: Path) -> None:
    found = {}
    for name, reference in (("recorded", of_this_machine()), ("other", replace(recorded(), versions={"torch": "1.0"}))):
        [found[name]] = tried(tmp_path / name, BY_NAME["fp32"], reference=reference)
    assert [one.compared_with for one in found.values()] == ["recorded", "computed here"]
    assert [one.outcome for one in found.values()] == ["passed", "passed"]
    # the run on the device that is the CPU itself
    assert found["other"].loss_distance == 0
    assert found["other"].recorded_distance == found["recorded"].recorded_distance == found["recorded"].loss_distance


@pytest.mark.slow
def test_a_wrong_record_is_found(tmp_path: Path) -> None:
    runs = {
        **recorded().runs,
        "fp32": {**recorded().runs["fp32"], "losses": moved(0.5, 3, recorded().runs["fp32"]["losses"])},
    }
    [found] = tried(tmp_path, BY_NAME["fp32"], reference=replace(of_this_machine(), runs=runs))
    assert found.outcome == "failed"
    assert "a loss differs by 0.5 nats" in found.reason


@pytest.mark.slow
def test_runs_that_are_not_recorded_are_computed_here(tmp_path: Path) -> None:
    [guarded] = [trial for trial in trials_of_a_gpu() if trial.module == GUARDED]
    for found in tried(tmp_path, guarded, *map(BY_NAME.get, ("DoRA", "patterns")), reference=of_this_machine()):
        assert (found.outcome, found.compared_with) == ("passed", "computed here"), found
        assert found.recorded_distance is None
        assert found.loss_distance > 0
        assert found.losses[-1] < found.losses[0]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT uses the name
def test_a_guard_that_lets_a_masked_eos_pass_fails_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Trials(tmp_path, device="cpu", devices=0, has_bf16=True)  # writes the base and the rows
    recipe = {
        "base": {"path": "base"},
        "data": {"train": ["rows.jsonl"]},
        "lora": {"r": 4, "alpha": 8, "target_modules": "all-linear"},
        "training": {
            "steps": 1,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "schedule": "constant",
            "precision": "fp32",
            "device": "cpu",
        },
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    monkeypatch.setattr("sys.argv", ["tiny_run", str(tmp_path / "recipe.json"), str(tmp_path / "evidence.json")])
    monkeypatch.setattr(tiny_run, "guard", lambda trainer, tokenizer: None)
    with pytest.raises(SystemExit, match="did not stop a run whose EOS is masked"):
        tiny_run.main()
    assert not (tmp_path / "evidence.json").exists()


@pytest.mark.slow
def test_the_whole_trial_runs_on_a_cpu(tmp_path: Path) -> None:
    report = front.tried([BY_NAME["bf16"]], SMALL, device="cpu", devices=1, has_bf16=True)
    assert report.failed == []
    report.write(tmp_path / "trial")
    data = json.loads((tmp_path / "trial" / JSON).read_text())
    assert data["reference"]["versions"] == recorded().versions
    assert {one["targets"] for one in data["shape"]["steps"]} == {"attention", "all-linear"}
    assert "this trainer" in (tmp_path / "trial" / PAGE).read_text()


@pytest.mark.slow
def test_a_tiny_run_is_compared_with_that_of_the_cpu(tmp_path: Path) -> None:
    broken = Trial("broken", "", {"precision": "fp32", "no_such_key": 1})
    found = tried(tmp_path, BY_NAME["bf16"], BY_NAME["fp16"], broken)
    assert [one.outcome for one in found] == ["passed", "not checked", "failed"]
    assert 0 < found[0].loss_distance < 0.2
    assert found[0].losses[-1] < found[0].losses[0] - 1
    assert "no_such_key" in found[2].reason


@pytest.mark.slow
def test_every_run_that_needs_no_gpu_passes_on_a_cpu(tmp_path: Path) -> None:
    for one in tried(tmp_path, *TRIALS):
        assert one.outcome == ("not checked" if one.reason else "passed"), one


def test_steps_of_a_shape_are_timed() -> None:
    ours, absent = measure(SMALL, device="cpu", peers={"TRL": None})
    assert (absent.contestant, absent.failed) == ("TRL", "not installed")
    assert ours.failed == ""
    assert ours.tokens_a_second == SMALL.tokens / ours.step_seconds
    assert ours.estimated_bytes > 0
    assert ours.estimated_seconds > 0
    assert WARM + MEASURED == 8


def test_the_products_of_a_step_are_those_that_torch_counts(tmp_path: Path) -> None:
    """By torch's own counter, which counts a forward pass of plain linear layers and attention."""
    write_json(tmp_path / "config.json", dict(SMALL.config))
    base = BaseFolder(tmp_path)
    model = base.empty_model().to_empty(device="cpu").train()
    model.set_attn_implementation("eager")  # whose products torch counts
    ids = torch.zeros(1, SMALL.tokens, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    lora = Lora(r=4, target_modules=["all-linear"])
    layers = planned_layers(base, lora)
    none = operations_of_a_step(base, SMALL, lora, [])
    shapes = [module.weight.shape for name, module in model.named_modules() if name in layers]
    assert operations_of_a_step(base, SMALL, lora, layers) - none == sum(
        6 * SMALL.tokens * 4 * sum(one) for one in shapes
    )
    # torch counts all of the scores, and the half is causal
    attention = 2 * 2 * SMALL.tokens**2 * 4 * 16 * 2
    forward = counter.get_total_flops() - attention
    assert none == 2 * forward + 7 * attention // 4


def test_a_shape_that_cannot_be_built_is_a_failure_with_its_error() -> None:
    [ours] = measure(Shape({**SMALL.config, "num_attention_heads": 3}, 8), device="cpu")
    assert ours.step_seconds is None
    assert ours.failed


def test_the_page_and_the_json_have_every_run(tmp_path: Path) -> None:
    results = [TrialResult(trial.name, "not checked", "there is one GPU | or none") for trial in TRIALS]
    failed = judge(TRIALS[0], evidence(losses=moved(0.5)), evidence(), evidence())
    results[0] = replace(failed, shows=TRIALS[0].shows, recorded_distance=0.25)
    shapes = [
        ShapeResult("this trainer", "attention", 0.1, 40_960.0, 21 << 30, 20 << 30, 0.08, 5),
        ShapeResult("TRL", "attention", failed="not installed"),
    ]
    gpu = {"name": "cuda:0 NVIDIA H100", "memory": 80 << 30}
    torch_build = {"version": "2.13.0", "build": "CUDA 13.0", "devices": [gpu, {"name": "CPU", "memory": 0}]}
    report = GpuReport(results, ("torch 9.9",), shapes, 600.0, {"version": "0.1", "torch": torch_build})
    assert report.failed == [TRIALS[0].name]
    report.write(tmp_path / "trial")
    data = json.loads((tmp_path / "trial" / JSON).read_text())
    assert [one["name"] for one in data["trials"]] == [trial.name for trial in TRIALS]
    assert data["shape"]["steps"][0]["waits"] == 5
    page = (tmp_path / "trial" / PAGE).read_text().splitlines()
    assert "- cuda:0 NVIDIA H100, 80.00 GiB" in page
    tables = [line for line in page if line.startswith("|")]
    assert len(tables) == 2 + len(TRIALS) + 2 + len(shapes)
    assert "| fp32 | losses and gradients of the CPU | failed: a loss differs by 0.5 nats" in "\n".join(tables)
    assert "| this trainer | attention | 100 ms | 80 ms | 40,960 | 21.00 GiB | 20.00 GiB (peak +5%) | 5 |" in tables
    assert "| TRL | attention | not measured: not installed |  |  |  |  |  |" in tables
    assert "| 0.5 nats | 0.00% | 0.25 nats | 0 MiB | 1.0 s |" in "\n".join(tables)
    assert f"recorded with torch {recorded().versions['torch']}" in "\n".join(page)
    assert "computed here again: torch 9.9" in "\n".join(page)
    assert data["reference"]["differences"] == ["torch 9.9"]
    assert data["reference"]["runs"].keys() == {"fp32", "bf16", "fp16"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_a_sentence_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--gpu", str(tmp_path / "trial")]) == 2
    assert "torch finds no CUDA device: no GPU was tried" in capsys.readouterr().err
    assert not (tmp_path / "trial").exists()


@pytest.mark.mistral_gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
def test_a_gpu_passes(tmp_path: Path) -> None:
    assert main(["doctor", "--gpu", str(tmp_path / "trial")]) == 0
