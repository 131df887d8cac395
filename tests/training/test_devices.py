from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import CONVERSATIONS, recipe_data, write_rows

from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import train


def test_two_devices_share_the_rows_of_one_step(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", CONVERSATIONS[:4])
    write_rows(tmp_path / "eval.jsonl", CONVERSATIONS[2:])
    training = {"steps": 3, "batch_size": 4, "micro_batch_tokens": 1, "logging_steps": 1}
    data = recipe_data(base, training=training, data={"eval": ["eval.jsonl"]})
    (tmp_path / "recipe.yaml").write_text(json.dumps({**data, "output": "two"}))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, "-m", "pytest_mistral_lora.training", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    one = train(parse_recipe(data, folder=tmp_path))
    two = [json.loads(line) for line in (tmp_path / "two" / "training_log.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["training"]["devices"] == 2
    for key in ("loss", "grad_norm", "eval_loss"):
        expected = [line[key] for line in one.log if key in line]
        assert [line[key] for line in two if key in line] == pytest.approx(expected, rel=1e-3)
