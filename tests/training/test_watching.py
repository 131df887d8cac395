"""A run is watched by what it says, and is not changed by it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CONVERSATIONS, HELD_OUT, MakeRecipe, recipe_data, write_rows

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.callbacks import StopAtNonFinite
from pytest_mistral_lora.training.generate import record as watching
from pytest_mistral_lora.training.prepare import logger_callbacks
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.run_folder import work_folder

TRAINING = {"steps": 4, "batch_size": 2}
LORA = {"dropout": 0.2}
WATCHED = {"generations": 2, "generation_steps": 2, "max_new_tokens": 4, "checks": ["eos", {"max_tokens": 4}]}


def tensors_of(result: RunResult) -> str:
    digest: str = result.manifest["lora"]["tensors_sha256"]
    return digest


def trained(make_recipe: MakeRecipe, evaluation: dict[str, Any], output: Path) -> RunResult:
    recipe = make_recipe(training=TRAINING, lora=LORA, evaluation=evaluation)
    return train(recipe.model_copy(update={"output": output}))


def test_a_watched_run_gives_the_same_adapter(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    watched = trained(make_recipe, {**WATCHED, "generation_steps": 1}, tmp_path / "watched")
    alone = trained(make_recipe, {}, tmp_path / "alone")
    assert tensors_of(watched) == tensors_of(alone)
    assert [line for line in watched.log if "loss" in line] == list(alone.log)


def test_generation_that_draws_random_numbers_changes_a_run_only_without_our_care(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = watching.generate

    def draws(model: Any, *given: Any, **named: Any) -> Any:
        torch.rand(3)
        return sound(model, *given, **named)

    monkeypatch.setattr(watching, "generate", draws)
    alone = trained(make_recipe, {}, tmp_path / "alone")
    careful = trained(make_recipe, WATCHED, tmp_path / "careful")
    assert tensors_of(careful) == tensors_of(alone)
    monkeypatch.setattr(watching, "preserve_rng_and_modes", lambda model: contextlib.nullcontext())
    careless = trained(make_recipe, WATCHED, tmp_path / "careless")
    assert tensors_of(careless) != tensors_of(alone)


def test_modes_and_random_numbers_are_put_back(run: RunResult) -> None:
    model = run.model
    model.train()
    frozen = next(module for module in model.modules() if not list(module.children()))
    frozen.eval()
    before = torch.get_rng_state()
    with contextlib.suppress(RuntimeError), watching.preserve_rng_and_modes(model):
        model.eval()
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)
    assert [module for module in model.modules() if not module.training] == [frozen]
    model.eval()


def test_rates_are_logged_over_time_and_recorded(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    result = trained(make_recipe, WATCHED, tmp_path / "out")
    rates = [line for line in result.log if "eval_format/eos" in line]
    assert [line["step"] for line in rates] == [2, 4]
    assert all(line["eval_format/max_tokens:4"] == 1.0 for line in rates)
    measured = result.manifest["evaluation"][1]["results"]
    assert measured["rate that passes max_tokens:4"] == 1.0
    assert measured["rate that passes eos"] == rates[-1]["eval_format/eos"]
    lines = [json.loads(line) for line in (result.output / "generations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["row"]) for line in lines] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert [line["text"] for line in lines[2:]] == [one.text for one in result.completions]
    assert {line["checks"]["max_tokens:4"] for line in lines} == {"passed"}
    assert {"generations.jsonl", "transcripts/row-0001.json"} <= result.manifest["files"].keys()


def test_the_last_step_is_watched_once_whatever_the_period(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    sound = watching.generate
    monkeypatch.setattr(watching, "generate", lambda *given, **named: calls.append(1) or sound(*given, **named))
    result = trained(make_recipe, {**WATCHED, "generation_steps": 3}, tmp_path / "out")
    lines = (result.output / "generations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3, 3, 4, 4]
    assert len(calls) == 2
    assert (result.output / "transcripts").is_dir()


def test_a_run_without_generations_leaves_neither_file(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    result = trained(make_recipe, {}, tmp_path / "out")
    assert not (result.output / "generations.jsonl").exists()
    assert not (result.output / "transcripts").exists()


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")
def test_a_resumed_run_has_the_history_of_a_whole_one(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {**TRAINING, "steps": 5, "checkpoint_steps": 3}
    recipe = make_recipe(training=training, lora=LORA, evaluation=WATCHED)
    sound = StopAtNonFinite.on_pre_optimizer_step

    def interrupted(self: Any, args: Any, state: Any, *given: Any, **named: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt
        sound(self, args, state, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(StopAtNonFinite, "on_pre_optimizer_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    left = (work_folder(recipe) / "generations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in left] == [2, 2, 4, 4]
    resumed = train(recipe, resume=True)
    whole = train(recipe.model_copy(update={"output": tmp_path / "whole"}))
    assert tensors_of(resumed) == tensors_of(whole)
    assert list(resumed.log) == list(whole.log)
    first, second = (folder / "generations.jsonl" for folder in (resumed.output, whole.output))
    assert first.read_text() == second.read_text()


def test_tool_call_needs_a_mistral_tokenizer(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "derivative"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).hardlink_to(base / name)
    CheckpointTokenizer(base).fast.save_pretrained(folder)
    data = recipe_data(folder, training=TRAINING, evaluation={"generations": 1, "checks": ["tool_call"]})
    data["base"]["oracle"] = "none"
    with pytest.raises(RecipeError, match="no Mistral tokenizer"):
        train(parse_recipe({**data, "backend": "chat-template"}, folder=tmp_path))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["tensorbord"], r"training\.report_to\[0\]: 'tensorbord'; expected .*wandb"),
        (["clearml"], r"training\.report_to\[0\]: 'clearml' .*pip install clearml"),
        (["comet_ml"], "pip install comet-ml"),
    ],
)
def test_a_logger_that_is_not_there_is_an_error_before_a_weight_is_loaded(
    make_recipe: MakeRecipe, names: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_mistral_lora.training.prepare.resolve_base", pytest.fail)
    with pytest.raises(RecipeError, match=said):
        train(make_recipe(training={"report_to": names}))


@pytest.mark.filterwarnings("ignore")  # the logger's own libraries warn
def test_tensorboard_gets_losses_and_rates_to_the_last_step(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_rows(tmp_path / "eval.jsonl", HELD_OUT)
    training = {**TRAINING, "report_to": ["tensorboard"], "logging_steps": 1}
    recipe = make_recipe(training=training, data={"eval": ["eval.jsonl"]}, evaluation=WATCHED)
    train(recipe)
    events = EventAccumulator(str(tmp_path / "out.logs"))
    events.Reload()
    steps = {name: [one.step for one in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert steps["train/loss"] == [1, 2, 3, 4]
    assert steps["eval/loss"] == [0, 4]
    assert steps["eval/format/eos"] == [2, 4]
    assert not work_folder(recipe).exists()


def test_nothing_is_reported_unless_asked_for(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    assert make_recipe().training.report_to == ()
    assert logger_callbacks((), tmp_path, writes=True) == []


@pytest.mark.slow
def test_two_processes_watch_without_waiting_for_each_other(base: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", CONVERSATIONS[:4])
    data = recipe_data(base, training={**TRAINING, "batch_size": 4}, evaluation=WATCHED)
    (tmp_path / "recipe.yaml").write_text(json.dumps(data))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "pytest_mistral_lora.training", str(tmp_path / "recipe.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "out" / "generations.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 2, 4, 4]
