"""Several processes do what one does: the same adapter, saved once; and when one fails, all end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from class_steps import CASES, ClassRun
from forked import run_forked
from safetensors.torch import load_file, save_file
from tiny_runs import CONVERSATIONS, recipe_data, write_rows

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.gate import Gate
from pytest_mistral_lora.training.adapter import adapter_tensors, expected_names
from pytest_mistral_lora.training.generate import load_adapted
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train

CONFIGURATIONS = Path(__file__).parents[2] / "examples" / "accelerate"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
LONGEST = 180
"""Seconds until a launch has failed; it takes less than ten where nothing else runs."""

# steps of three rows and of one: a process has two, one or none, and other micro-batches than its neighbour
TRAINING = {
    "steps": 20,
    "batch_size": 3,
    "micro_batch_tokens": 30,
    "learning_rate": 0.003,
    "logging_steps": 1,
    "checkpoint_steps": 5,
}


HELD_OUT = [
    [
        ("user", "How many wheels does a car have?"),
        ("assistant", "A car has four wheels."),
        ("user", "And a bicycle?"),
        ("assistant", "A bicycle has two."),
    ],
    [("user", "Name an even number."), ("assistant", "Eight is even.")],
    CONVERSATIONS[4],
]
"""Rows for the gate, which takes none that are trained on."""


@dataclass(frozen=True)
class Job:
    """A recipe on disk that two processes train."""

    folder: Path
    output: str = "out"

    def write(self, base: Path, **training: Any) -> Job:
        write_rows(self.folder / "rows.jsonl", CONVERSATIONS[:4])
        write_rows(self.folder / "eval.jsonl", HELD_OUT)
        data = recipe_data(
            base,
            training={**TRAINING, **training},
            data={"eval": ["eval.jsonl"]},
            evaluation={"generations": 2, "max_new_tokens": 4, "gate": True},
        )
        (self.folder / "recipe.yaml").write_text(json.dumps({**data, "output": self.output}))
        return self

    @contextmanager
    def started(self, configuration: str, *options: str) -> Iterator[subprocess.Popen[str]]:
        """Start two processes with a configuration of the examples."""
        with subprocess.Popen(
            self.command(configuration, *options),
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def command(self, configuration: str, *options: str) -> list[str]:
        file = CONFIGURATIONS / f"{configuration}.yaml"
        launcher = ["accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
        run = ["-m", "pytest_mistral_lora.training", str(self.folder / "recipe.yaml"), *options]
        return [sys.executable, "-m", *launcher, "--main_process_port", "0", *run]

    def launch(self, configuration: str, *options: str) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error."""
        done = run_forked(self.command(configuration, *options), env=ENVIRONMENT)
        return done.returncode, done.stdout, done.stderr

    def finish(self, configuration: str, *options: str) -> Job:
        code, output, errors = self.launch(configuration, *options)
        assert code == 0, errors
        assert output == f"{self.folder / self.output}\n"  # one process speaks
        assert "FSDP2-wrapped module" not in errors  # a warning of hooks that are lost
        return self

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_file(self.folder / self.output / "adapter_model.safetensors")
        return found

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = (self.folder / self.output / "training_log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    @property
    def manifest(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / self.output / "manifest.json").read_text())
        return found

    @property
    def work(self) -> Path:
        return self.folder / f"{self.output}.work"

    @property
    def failure(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.work / "failure.json").read_text())
        return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, base: Path) -> RunResult:
    """The run of one process."""
    job = Job(tmp_path_factory.mktemp("one")).write(base, checkpoint_steps=100)
    return train(parse_recipe(json.loads((job.folder / "recipe.yaml").read_text()), folder=job.folder))


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Job:
    return Job(tmp_path_factory.mktemp("ddp")).write(base, activation_checkpointing=True).finish("ddp")


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Job:
    """Sharded processes, one of which was killed after the first checkpoint; the launcher has ended the other."""
    job = Job(tmp_path_factory.mktemp("killed")).write(base, activation_checkpointing=True)
    with job.started("fsdp2") as launcher:
        while not (job.work / "checkpoint-5" / "files.json").is_file():
            assert launcher.poll() is None
            time.sleep(0.01)
        processes = psutil.Process(launcher.pid).children(recursive=True)
        next(one for one in processes if one.environ().get("RANK") == "1").kill()
        launcher.communicate(timeout=LONGEST)
        assert launcher.returncode == 1
        assert (job.work / "checkpoint-5" / "pytorch_model_fsdp_0").is_dir()  # sharded for real
        _, alive = psutil.wait_procs(processes, timeout=LONGEST)
        assert not alive
    return job


@pytest.fixture(scope="module")
def seeds_of_dropout(killed: Job) -> list[torch.Tensor]:
    folder = next(killed.work.glob("checkpoint-*"))
    return [torch.load(folder / f"rng_state_{rank}.pth", weights_only=False)["cpu"] for rank in range(2)]


@pytest.fixture(scope="module")
def fsdp2(killed: Job, seeds_of_dropout: list[torch.Tensor]) -> Job:
    """The same, after it went on."""
    return killed.finish("fsdp2", "--resume")


@pytest.fixture(params=["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest) -> Job:
    job: Job = request.getfixturevalue(request.param)
    return job


def assert_same_run(job: Job, one: RunResult, rel: float) -> None:
    assert [line["step"] for line in job.log] == [line["step"] for line in one.log]
    for key in ("loss", "eval_loss", "grad_norm"):
        expected = [line[key] for line in one.log if key in line]
        assert [line[key] for line in job.log if key in line] == pytest.approx(expected, rel=rel)


def test_two_processes_take_the_steps_of_one(several: Job, one: RunResult) -> None:
    assert_same_run(several, one, rel=1e-3)
    assert several.manifest["training"]["devices"] == 2
    assert several.manifest["evaluation"][1]["results"]["rows"] == 2


def test_two_processes_compute_the_gate_of_one(several: Job, one: RunResult) -> None:
    assert one.gate is not None
    gate = Gate.recorded_in(several.manifest)
    assert gate is not None
    [found], [expected] = gate.lines, one.gate.lines
    assert (found.name, found.rows, found.tokens) == (expected.name, 3, expected.tokens)
    assert (found.verdict, found.base) == ("undecided", pytest.approx(expected.base, rel=1e-5))
    assert (found.adapter, found.low) == pytest.approx((expected.adapter, expected.low), rel=1e-3)


def test_two_processes_make_the_adapter_of_one(several: Job, one: RunResult) -> None:
    found = several.tensors
    assert found.keys() == expected_names(one.adapter.layers)
    for name, expected in one.adapter.tensors.items():
        assert found[name].dtype == torch.float32
        moved = (expected - one.adapter.initial[name]).norm().item()
        assert (found[name] - expected).norm().item() < 1e-2 * moved, name


def test_the_saved_adapter_is_complete(several: Job, base: Path) -> None:
    model = load_adapted(AdapterFolder(several.folder / "out"), BaseFolder(base), "fp32", "cpu")
    assert {name: tensor.shape for name, tensor in adapter_tensors(model).items()} == {
        name: tensor.shape for name, tensor in several.tensors.items()
    }
    found = [file.name for file in several.folder.iterdir()]
    assert sorted(found) == ["eval.jsonl", "out", "recipe.yaml", "rows.jsonl"]  # no checkpoint is left


@pytest.mark.slow
def test_each_process_drops_out_its_own(seeds_of_dropout: list[torch.Tensor]) -> None:
    assert not torch.equal(*seeds_of_dropout)


@pytest.mark.slow
def test_a_killed_run_went_on(fsdp2: Job) -> None:
    assert fsdp2.manifest["training"]["resumed_from_step"] >= 5


@pytest.mark.slow
def test_a_sharded_base_of_bf16_keeps_its_adapter_in_fp32(one: RunResult, base: Path, tmp_path: Path) -> None:
    job = Job(tmp_path).write(base, precision="bf16", steps=4).finish("fsdp2")
    assert {tensor.dtype for tensor in job.tensors.values()} == {torch.float32}
    losses, expected = ([line["loss"] for line in log if "loss" in line] for log in (job.log, one.log))
    assert losses == pytest.approx(expected[:4], rel=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wrapped-ministral3-tied", "mixtral", "wrapped-mistral4"])
def test_a_sharded_run_of_another_class_is_that_of_one_process(kind: str, tmp_path: Path) -> None:
    run = ClassRun(next(case for case in CASES if str(case) == kind), tmp_path)
    run.write_base()
    (tmp_path / "alone").mkdir()
    (tmp_path / "sharded").mkdir()
    alone = Job(tmp_path / "alone").write(run.base, steps=4, checkpoint_steps=100)
    one = train(parse_recipe(json.loads((alone.folder / "recipe.yaml").read_text()), folder=alone.folder))
    job = Job(tmp_path / "sharded").write(run.base, steps=4, activation_checkpointing=True).finish("fsdp2")
    assert_same_run(job, one, rel=1e-3)
    assert job.tensors.keys() == expected_names(one.adapter.layers)
    for name, expected in one.adapter.tensors.items():
        moved = (expected - one.adapter.initial[name]).norm().item()
        assert (job.tensors[name] - expected).norm().item() < 1e-2 * moved, name


@pytest.mark.slow
def test_a_row_that_is_not_finite_in_one_process_ends_all(one: RunResult, base: Path, tmp_path: Path) -> None:
    second, *others = [set(row.input_ids) for row in (one.data.train.encoded[1], *one.data.train.encoded)]
    only = max(second - set().union(others[0], *others[2:]))
    broken = Path(shutil.copytree(base, tmp_path / "base"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.embed_tokens.weight"][only] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    job = Job(tmp_path).write(broken)
    code, _, errors = job.launch("ddp")
    assert code == 1
    assert errors.count("error: the loss is nan at step") == 2
    assert job.failure["exit_code"] == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_what_is_wrong_from_the_start_ends_all(ddp: Job) -> None:
    code, _, errors = ddp.launch("ddp")
    assert code == 1  # the launcher's own; ours is in the file
    assert "out: exists already" in errors
    assert ddp.failure["exit_code"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["ddp", "fsdp2"])
def test_two_processes_go_on_from_an_adapter(one: RunResult, base: Path, tmp_path: Path, configuration: str) -> None:
    job = Job(tmp_path).write(base, steps=2)
    recipe = json.loads((tmp_path / "recipe.yaml").read_text())
    recipe["lora"]["start"] = str(one.output)
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    start = job.finish(configuration).manifest["lora"]["start"]
    ended = [line["eval_loss"] for line in one.log if "eval_loss" in line][-1]
    assert start["parent_held_out_loss"] == ended
    assert start["held_out_loss"] == pytest.approx(ended, abs=1e-6)
    assert start["tensors_sha256"] == one.manifest["lora"]["tensors_sha256"]
