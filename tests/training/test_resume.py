from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_runs import MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run import train, work_folder

TRAINING = {"steps": 120, "batch_size": 2, "micro_batch_tokens": 1, "checkpoint_steps": 5}


@pytest.fixture
def killed(tmp_path: Path, base: Path) -> Recipe:
    """A run that was killed after its second checkpoint."""
    write_rows(tmp_path / "rows.jsonl")
    data = recipe_data(base, training=TRAINING, lora={"dropout": 0.1})
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    recipe = parse_recipe(data, folder=tmp_path)
    command = [sys.executable, "-m", "pytest_mistral_lora.training", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not (work_folder(recipe) / "checkpoint-10" / "trainer_state.json").is_file():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert not recipe.output.exists()
    return recipe


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")  # two checkpoints within a second
def test_a_killed_run_resumes_to_the_same_adapter(killed: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--resume"):
        train(killed)
    other = killed.model_copy(update={"training": killed.training.model_copy(update={"learning_rate": 0.02})})
    with pytest.raises(InputError, match="another recipe"):
        train(other, resume=True)
    resumed = train(killed, resume=True)
    assert resumed.manifest["training"]["resumed_from_step"] >= 10
    assert not work_folder(killed).exists()

    whole = train(killed.model_copy(update={"output": tmp_path / "whole"}))
    assert whole.manifest["training"]["resumed_from_step"] is None
    assert resumed.manifest["lora"] == whole.manifest["lora"]
    assert list(resumed.log) == list(whole.log)


def test_resuming_without_a_checkpoint_starts_anew(make_recipe: MakeRecipe) -> None:
    run = train(make_recipe(training={"steps": 2}), resume=True)
    assert run.manifest["training"]["resumed_from_step"] is None
