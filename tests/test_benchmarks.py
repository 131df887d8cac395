"""The benchmarks run, say when a ratio does not count, and are what their README says; how fast is no test."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from forked import run_forked
from sampling import sampled
from torch._subclasses.fake_tensor import FakeTensorMode

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.training.adapter import adapted_layers, peft_quiet
from pytest_mistral_lora.training.recipe import Lora

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
README = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
SCRIPTS = (
    "train.py",
    "encode.py",
    "dataset_rows.py",
    "load.py",
    "patches.py",
    "answers.py",
    "golden.py",
    "counted.py",
    "guard.py",
)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return {
        name: importlib.import_module(name) for name in ("report", "meters", "rows", "golden", "fake_step", "counted")
    }


def run(script: str, *options: object) -> subprocess.CompletedProcess[str]:
    return run_forked([sys.executable, BENCHMARKS / script, *options])


@pytest.mark.slow
def test_training_is_measured_beside_transformers_with_the_same_losses(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = run("train.py", "--quick", "--rows", 8, "--held-out", 2, "--repetitions", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    (table,) = json.loads(file.read_text())["tables"]
    ours, plain = (table["results"][name] for name in ("ours", "transformers Trainer, padded"))
    assert ours["counts"]
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert ours["losses"] != ours["losses"][:1] * 2
    assert ours["held_out_loss"] == pytest.approx(plain["held_out_loss"], rel=1e-3)
    assert all(ours[name] > 0 for name in ("tokens_per_second", "supervised_per_second", "memory_mib", "of_limit"))
    assert "does not count" not in done.stdout


@pytest.mark.slow
def test_encoding_is_measured_beside_mistral_common(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    options = ("--rows", 5, "--generated", "--repetitions", 1, "--processes", 1, "--tokenizer", "spm-v3")
    done = run("encode.py", *options, "--json", file)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())["spm-v3"]
    assert {"mistral-common alone: ids", "ours, one process: ids and labels"} <= figures.keys()


@pytest.mark.parametrize(
    "patch", sampled(["tools", "decode", "sandbox", "template", "tekken", "conversion", "layers"], ["template"])
)
@pytest.mark.parametrize("side", [pytest.param("with", marks=pytest.mark.slow), "without"])
def test_a_side_of_a_speed_patch_is_measured(patch: str, side: str) -> None:
    done = run("patches.py", "--side", side, "--patch", patch, "--rows", 2)
    assert done.returncode == 0, done.stderr
    seconds, memory = json.loads(done.stdout)
    assert seconds > 0
    assert memory >= 0


@pytest.mark.slow
def test_the_suite_is_measured_beside_its_imports(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    golden, file = modules["golden"], tmp_path / "found.json"
    monkeypatch.setattr(golden, "IMPORTS", (sys.executable, "-c", "import json"))
    golden.main(["--pairs", "1", "--select", "spm-v1 and bos-once", "--json", str(file)])
    found = json.loads(file.read_text())
    ((imports, _),), ((suite, _),) = found["imports"], found["suite"]
    assert found["ratios"] == [suite / imports]
    assert suite > imports > 0
    assert "pytest --mistral-golden -k spm-v1 and bos-once" in capsys.readouterr().out


def test_the_costs_of_a_run_that_fails_are_not_reported(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="ended with exit code 3:\nred"):
        modules["golden"].cost_of([sys.executable, "-c", "print('red'); raise SystemExit(3)"], tmp_path)


def a_run(losses: tuple[float, ...], held_out: float = 3.0, wall: float = 1.0) -> dict[str, Any]:
    step = {"wall": wall, "cpu": wall, "tokens": 100, "supervised": 30}
    return {
        "steps": [{**step, "loss": loss} for loss in losses],
        "memory": 2**20,
        "held_out_loss": held_out,
        "needed_flops": 1e9,
        "possible_flops": 1e10,
        "versions": {},
    }


@pytest.mark.parametrize(
    ("name", "found", "counts"),
    [
        ("ours", a_run((4.0, 3.0)), True),
        ("ours", a_run((4.0, 3.001)), True),
        ("ours", a_run((4.0, 3.01)), False),
        ("ours", a_run((4.0, float("nan"))), False),
        ("TRL, packed", a_run((9.0, 9.0, 9.0), held_out=3.05), True),
        ("TRL, packed", a_run((4.0, 3.0), held_out=3.1), False),
    ],
)
def test_a_ratio_counts_only_where_the_same_is_learned(
    modules: dict[str, ModuleType], name: str, found: dict[str, Any], counts: bool
) -> None:
    report = modules["report"]
    summary = report.summarize({"TRL, padded": [a_run((4.0, 3.0))], name: [found]}, "fp32")[name]
    assert summary["counts"] is counts
    assert ("does not count" in report._cells(summary)) is not counts


def test_a_ratio_is_of_times_without_the_first_step(modules: dict[str, ModuleType]) -> None:
    fast = a_run((4.0, 3.0, 2.0), wall=0.5)
    fast["steps"][0]["wall"] = 1000.0
    runs = {"TRL, padded": [a_run((4.0, 3.0, 2.0))], "ours": [fast]}
    assert modules["report"].summarize(runs, "fp32")["ours"]["ratio"] == 2.0


def test_the_padding_ratio_is_fed_tokens_over_real_ones(modules: dict[str, ModuleType]) -> None:
    rows = [{"input_ids": [1] * length, "labels": [-100] * length} for length in (10, 30, 20, 20)]
    assert modules["report"].figures(rows, 2)["padding_ratio"] == 1.25


def test_needed_operations_are_those_that_torch_counts(modules: dict[str, ModuleType]) -> None:
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=500, num_hidden_layers=8, attn_implementation="eager", **shape)
    targets = [f"{name}_proj" for name in "qkvo"]
    lora = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    with peft_quiet():
        model = get_peft_model(MistralForCausalLM(config), lora)
    ids = torch.arange(100)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    rows = [{"input_ids": list(range(100)), "labels": [-100, *range(1, 100)]}]
    masked_half = 8 * 6 * 64 * 100**2  # which this attention computes all the same
    needed = modules["meters"].needed_flops(config, 4, rows)
    assert counter.get_total_flops() - masked_half == pytest.approx(needed, rel=0.02)
    # the head counts where there is loss, and nowhere else
    unsupervised = [{"input_ids": list(range(100)), "labels": [-100] * 100}]
    assert needed - modules["meters"].needed_flops(config, 4, unsupervised) == 4 * 64 * 500 * 99


@pytest.mark.slow
def test_the_guard_is_measured_beside_the_steps_of_its_run(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = run("guard.py", "--shape", "quick", "--rows", 2, "--tokens", 32, "--pairs", 1, "--steps", 1, "--json", file)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert all(value > 0 for value in found["summary"].values())
    [without], [guarded] = (found["runs"][side] for side in ("without", "with"))
    assert without["targets"] == without["positions"] == 0 < guarded["positions"] < guarded["targets"]


@pytest.mark.slow
def test_steps_are_counted_without_a_gpu(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = run("counted.py", "--quick", "--json", file)
    assert done.returncode == 0, done.stderr
    assert "counted, not measured: 650 TFLOP/s" in done.stdout
    found = {(row["weights"], row["adapted"], row["cards"]): row for row in json.loads(file.read_text())}
    assert len(found) == 2 * 2 * 2
    for row in found.values():
        assert row["launches"] * 2e-3 < row["products"] + row["attention"] + row["other"]
        assert (row["exchange"] > 0) is (row["cards"] == 8)
        assert (row["useful"] < 1) is (row["cards"] == 8)
    # two layers of 218 million values, embeddings and head of 134 million each
    full, four_bits = (found[weights, "attention", 1]["peak"] for weights in ("bf16", "nf4"))
    assert full - four_bits == pytest.approx(2 * 218e6 * 1.48 / 2**30, rel=0.5)
    assert found["bf16", "all layers", 1]["products"] > found["bf16", "attention", 1]["products"]


def test_rows_that_are_dealt_keep_more_cards_busy_in_larger_steps(modules: dict[str, ModuleType]) -> None:
    share = modules["counted"].useful_share
    assert 0.5 < share(16, 8) < share(32, 8) < share(128, 8) < 1
    assert share(64, 1) == 1


def test_operators_are_counted_by_their_operations_and_bytes(modules: dict[str, ModuleType]) -> None:
    fake = modules["fake_step"]
    machine = fake.Machine(product_flops=1e9, attention_flops=1e9, bytes=1e9, launch_seconds=1.0)
    with FakeTensorMode(), fake.Count(machine, [5]) as count:
        left, right = torch.zeros(20, 30), torch.zeros(30, 40)
        product = left @ right.T.contiguous().T
        product.view(-1).add_(1)
        kept = left.T
        del right, left, product
    assert count.now == kept.nbytes == 20 * 30 * 4
    # both matrices, the copy of one, and the product
    assert count.most == 4 * (20 * 30 + 2 * 30 * 40 + 20 * 40)
    assert count.work["product"] == fake.Work(1, 4 * (20 * 30 + 30 * 40 + 20 * 40), 2 * 20 * 30 * 40)
    assert count.seconds["product"] == pytest.approx(1 + 48e3 / 1e9)
    # a view launches nothing: two matrices are filled, one is copied, and one is added to
    assert count.work["other"].launches == 4


def test_the_counted_operations_are_those_that_a_step_needs(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    fake, counted = modules["fake_step"], modules["counted"]
    config = {**counted.configuration("7B", 4), "hidden_size": 512, "intermediate_size": 1024, "vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base, lora, mode = BaseFolder(tmp_path), Lora(r=16), FakeTensorMode(allow_non_fake_inputs=True)
    model = fake.fake_model(base, lora, adapted_layers(base, lora.target_modules), "bf16", mode)
    with fake.on_gpu():
        count = fake.FakeStep(model, [300, 200], mode).run()
    rows = [{"input_ids": [1] * (length + 1), "labels": [-100] + [1] * length} for length in (300, 200)]
    needed = modules["meters"].needed_flops(base.model_config(), 16, rows)
    done = count.work["product"].flops + count.work["attention"].flops
    # flash attention computes its scores again, and the first layer's input needs no gradient
    assert done == pytest.approx(needed, rel=0.05)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_options_in_the_readme_exist(script: str) -> None:
    lines = re.findall(rf"^ {{4,}}\S+ benchmarks/{script}(.*)$", README.replace("\\\n", " "), flags=re.MULTILINE)
    assert lines
    known = run(script, "--help").stdout
    for option in re.findall(r"(?<= )--[a-z-]+", " ".join(lines)):
        assert re.search(rf"{option}\b", known), option


def test_the_environment_installs_the_chats_that_the_benchmark_names(modules: dict[str, ModuleType]) -> None:
    assert modules["rows"].CHATS in (BENCHMARKS.parent / "tox.ini").read_text()
