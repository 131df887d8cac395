"""What a GPU does with a recipe, beside a CPU: `pytest -m mistral_gpu` on a machine that has one.

The runs that a CPU can make are made on it, too, so that the comparison itself is tried.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sampling import sampled_case
from tiny_runs import recipe_data, write_rows
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import StoppedError
from pytest_mistral_lora.training.adapter import attach_adapter
from pytest_mistral_lora.training.callbacks import StopRequest
from pytest_mistral_lora.training.layers import planned_layers
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.memory import RunMemory
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
ON_CUDA = [pytest.mark.mistral_gpu, NO_CUDA]
NO_BF16 = pytest.mark.skipif(
    torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False),
    reason="this GPU does not compute in bf16",
)
DEVICES = ["cpu", pytest.param("cuda", marks=[*ON_CUDA, NO_BF16])]

STEPS = 8
PROMPT = "You answer questions about a shop that sells boats, kindly and in one sentence."
ROWS = [
    [
        ("system", PROMPT),
        ("user", f"How many boats of kind {number} are there?{' Please.' * (number % 5)}"),
        ("assistant", f"There are {number * 7 % 11} of them{' now' * (number % 4)}."),
    ]
    for number in range(24)
]
"""Rows that begin alike, of several lengths."""

Sections = dict[str, dict[str, Any]]
RUNS: dict[str, Sections] = {
    "fp32": {"training": {"precision": "fp32"}},
    "bf16": {},
    "rows alone": {"training": {"micro_batch_tokens": 1}},
    "checkpointed": {"training": {"activation_checkpointing": True}},
    "shared prefix": {"training": {"share_prefix": True}},
    "DoRA": {"lora": {"dora": True}},
    "head in full": {"lora": {"modules_to_save": ["lm_head"]}},
    "patterns": {
        "lora": {"layers_to_transform": [1], "rank_pattern": {"v_proj": 4}, "alpha_pattern": {"down_proj": 8}}
    },
}
"""Sections of recipes whose losses are those of the CPU in fp32 with the same `lora`, but for rounding."""

Evidence = tuple[Sequence[float], Sequence[float]]
"""The loss, in nats a token, and the L2 norm of the gradients of each step."""

Run = Callable[..., Evidence]


def recipe_of(base: Path, device: str, **sections: dict[str, Any]) -> dict[str, Any]:
    training = {
        "steps": STEPS,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "precision": "bf16",
        "device": device,
        **sections.get("training", {}),
    }
    return recipe_data(base, training=training, lora={"target_modules": "all-linear", **sections.get("lora", {})})


def evidence_of(log: Sequence[Mapping[str, Any]]) -> Evidence:
    steps = [line for line in log if "loss" in line]
    return [line["loss"] for line in steps], [line["grad_norm"] for line in steps]


@pytest.fixture(scope="module")
def run_on(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a recipe on a device, and return its evidence; the same run is made once."""
    found: dict[str, Evidence] = {}

    def run(device: str, **sections: dict[str, Any]) -> Evidence:
        key = json.dumps([device, sections], sort_keys=True)
        if key not in found:
            folder = tmp_path_factory.mktemp("run")
            write_rows(folder / "rows.jsonl", ROWS)
            found[key] = evidence_of(train(parse_recipe(recipe_of(base, device, **sections), folder=folder)).log)
        return found[key]

    return run


def distances(found: Evidence, expected: Evidence) -> tuple[float, float]:
    """Return the largest distance of a loss, in nats, and of a gradient's norm, relative."""
    losses, norms = (list(zip(*pair, strict=True)) for pair in zip(found, expected, strict=True))
    return max(abs(one - other) for one, other in losses), max(abs(one - other) / other for one, other in norms)


def assert_as_on_the_cpu(found: Evidence, run_on: Run, precision: str = "bf16", **sections: dict[str, Any]) -> None:
    """Assert that rounding explains what is between a run and that of the CPU in fp32: thrice what bf16 makes there."""
    assert len(found[0]) == STEPS
    assert all(map(math.isfinite, (*found[0], *found[1])))
    expected, in_bf16 = (run_on("cpu", training={"precision": one}, **sections) for one in ("fp32", "bf16"))
    least = (1e-3, 1e-2) if precision == "fp32" else (0.02, 0.1)
    by_rounding = (0.0, 0.0) if precision == "fp32" else distances(in_bf16, expected)
    for distance, floor, noise in zip(distances(found, expected), least, by_rounding, strict=True):
        assert distance <= max(floor, 3 * noise)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *(sampled_case(name, "cpu", name=f"{name}-cpu", is_kept=name == "rows alone") for name in RUNS),
        *(
            pytest.param(name, "cuda", id=f"{name}-cuda", marks=ON_CUDA if name == "fp32" else [*ON_CUDA, NO_BF16])
            for name in RUNS
        ),
    ],
)
def test_losses_and_gradients_are_those_of_the_cpu(name: str, device: str, run_on: Run) -> None:
    sections = RUNS[name]
    precision = sections.get("training", {}).get("precision", "bf16")
    lora = {"lora": sections["lora"]} if "lora" in sections else {}
    assert_as_on_the_cpu(run_on(device, **sections), run_on, precision, **lora)


def test_another_run_is_not_taken_for_that_of_the_cpu(run_on: Run) -> None:
    with pytest.raises(AssertionError):
        assert_as_on_the_cpu(run_on("cpu", training={"precision": "fp32", "learning_rate": 1.1e-3}), run_on, "fp32")


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_that_goes_on_after_a_stop_is_the_whole_run(device: str, run_on: Run, base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    recipe, stop = parse_recipe(recipe_of(base, device), folder=tmp_path), StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(StoppedError):
        train(recipe, stop=stop)
    found = evidence_of(train(recipe, resume=True).log)
    # a GPU adds in an order that changes
    assert distances(found, run_on(device))[0] <= (0 if device == "cpu" else 1e-3)


@pytest.mark.mistral_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds no two CUDA devices here")
@NO_BF16
@pytest.mark.parametrize("configuration", ["ddp", "fsdp2"])
def test_all_gpus_train_to_the_losses_of_the_cpu(configuration: str, run_on: Run, base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe_of(base, "cuda")))
    file = Path(__file__).parents[2] / "examples" / "accelerate" / f"{configuration}.yaml"
    launcher = ["accelerate.commands.launch", "--config_file", str(file), "--main_process_port", "0"]
    launcher += ["--num_processes", str(torch.cuda.device_count())]
    train_in(tmp_path, "-m", *launcher)
    lines = (tmp_path / "out" / "training_log.jsonl").read_text().splitlines()
    assert_as_on_the_cpu(evidence_of(list(map(json.loads, lines))), run_on)


def train_in(folder: Path, *launcher: str) -> None:
    """Train the recipe of a folder in a process of its own, as a user starts it."""
    command = [sys.executable, *launcher, "-m", "pytest_mistral_lora.training", str(folder / "recipe.yaml")]
    done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run_on_cuda(base: Path, folder: Path, **training: Any) -> RunResult:
    write_rows(folder / "rows.jsonl")
    data = recipe_data(base, training={"device": "cuda", "logging_steps": 1, **training})
    return train(parse_recipe(data, folder=folder))


@pytest.mark.mistral_gpu
@NO_CUDA
def test_fp16_trains_and_counts_what_it_skips(base: Path, tmp_path: Path) -> None:
    result = run_on_cuda(base, tmp_path, precision="fp16", steps=20)
    losses = [line["loss"] for line in result.log if "loss" in line]
    assert losses[-1] < losses[0] / 2
    recorded = result.manifest["training"]
    assert recorded["precision"] == "fp16"
    assert recorded["skipped_steps"] == sum("loss_scale" in line for line in result.log)


@pytest.mark.mistral_gpu
@NO_CUDA
@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed here")
def test_ligers_kernels_train_to_the_losses_of_the_models_own(base: Path, tmp_path: Path) -> None:
    losses = {}
    for kernels in (None, "liger"):
        folder = tmp_path / str(kernels)
        folder.mkdir()
        write_rows(folder / "rows.jsonl")
        training = {"device": "cuda", "logging_steps": 1, "precision": "fp32", "steps": 5, "kernels": kernels}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_data(base, training=training)))
        train_in(folder)
        assert read_json(folder / "out" / "manifest.json")["training"]["kernels"] == kernels
        log = (folder / "out" / "training_log.jsonl").read_text().splitlines()
        losses[kernels] = [line["loss"] for line in map(yaml.safe_load, log) if "loss" in line]
    assert losses["liger"] == pytest.approx(losses[None], rel=1e-3)


TOKENS = 4096
SEVEN_B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32768,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
"""Four of the 32 layers of Mistral 7B v0.3, its embeddings and its head."""


class Waits(TrainerCallback):  # type: ignore[misc]
    """Counts how often the last step waits for the GPU."""

    def __init__(self, step: int) -> None:
        self.count = 0
        self._step = step
        self._caught = warnings.catch_warnings(record=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step - 1:
            self._found = self._caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            torch.cuda.set_sync_debug_mode("default")
            self._caught.__exit__(None, None, None)
            self.count = len(self._found)


@pytest.mark.mistral_gpu
@NO_CUDA
@NO_BF16
@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_a_step_of_7bs_shape_fits_its_estimate_and_waits_once(targets: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEVEN_B))
    training = {"steps": 4, "batch_size": 1, "micro_batch_tokens": TOKENS, "max_length": TOKENS + 1}
    training |= {"precision": "bf16", "device": "cuda", "dry_run": False, "checkpoint_minutes": 1000}
    data = recipe_data(folder, weights_sha256="0" * 64, training=training, lora={"target_modules": targets})
    recipe, base = parse_recipe(data, folder=tmp_path), BaseFolder(folder)
    layers = planned_layers(base, recipe.lora)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    ids = torch.randint(3, SEVEN_B["vocab_size"], (4, TOKENS + 1), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [EncodedRow(tuple(row), tuple(row), ()) for row in ids]
    adapted = attach_adapter(model, recipe.lora, layers, seed=0)
    trainer: Any = make_trainer(adapted, recipe.training, rows, [], work=tmp_path / "work")
    waits = Waits(step=4)
    trainer.add_callback(waits)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    estimate = RunMemory(base, recipe, layers, "bf16", True, TOKENS).total
    assert 0.7 <= torch.cuda.max_memory_allocated() / estimate <= 1.1
    assert waits.count == 1
