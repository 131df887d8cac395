"""What only a GPU can show of a recipe's precision and kernels: `pytest -m mistral_gpu` on a machine that has one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_runs import recipe_data, write_rows

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

pytestmark = [
    pytest.mark.mistral_gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here"),
]


def run(base: Path, folder: Path, **training: Any) -> RunResult:
    write_rows(folder / "rows.jsonl")
    data = recipe_data(base, training={"device": "cuda", "logging_steps": 1, **training})
    return train(parse_recipe(data, folder=folder))


def test_fp16_trains_and_counts_what_it_skips(base: Path, tmp_path: Path) -> None:
    result = run(base, tmp_path, precision="fp16", steps=20)
    losses = [line["loss"] for line in result.log if "loss" in line]
    assert losses[-1] < losses[0] / 2
    recorded = result.manifest["training"]
    assert recorded["precision"] == "fp16"
    assert recorded["skipped_steps"] == sum("loss_scale" in line for line in result.log)


@pytest.mark.skipif(find_spec("liger_kernel") is None, reason="liger-kernel is not installed here")
def test_ligers_kernels_train_to_the_losses_of_the_models_own(base: Path, tmp_path: Path) -> None:
    """Each in a process of its own, as a user starts it."""
    losses = {}
    for kernels in (None, "liger"):
        folder = tmp_path / str(kernels)
        folder.mkdir()
        write_rows(folder / "rows.jsonl")
        training = {"device": "cuda", "logging_steps": 1, "precision": "fp32", "steps": 5, "kernels": kernels}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe_data(base, training=training)))
        command = [sys.executable, "-m", "pytest_mistral_lora.training", str(folder / "recipe.yaml")]
        done = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert read_json(folder / "out" / "manifest.json")["training"]["kernels"] == kernels
        log = (folder / "out" / "training_log.jsonl").read_text().splitlines()
        losses[kernels] = [line["loss"] for line in map(yaml.safe_load, log) if "loss" in line]
    assert losses["liger"] == pytest.approx(losses[None], rel=1e-3)
