"""A run that ended early and went on is the run that never ended: the same adapter, the same log."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import HELD_OUT, MakeRecipe, base_with, recipe_data, write_rows
from transformers import Trainer, TrainerCallback

from pytest_mistral_lora.errors import InputError, StoppedError
from pytest_mistral_lora.records.files import listing, write_json
from pytest_mistral_lora.training.callbacks import RunningLoss, SaveByTime, StopRequest
from pytest_mistral_lora.training.prepare import prepare
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.run_folder import LIST, checkpoints, fault_of, step_of, work_folder
from pytest_mistral_lora.training.step.trainer import LoraTrainer

TRAINING: dict[str, Any] = {
    "steps": None,
    "epochs": 2,
    "batch_size": 2,
    "micro_batch_tokens": 1,
    "schedule": "cosine",
    "logging_steps": 4,
    "eval_steps": 2,
}
"""Six steps; an epoch ends in the middle, a line of the log covers more than one start."""
THREE_STEPS = {"epochs": None, "steps": 3}

Uninterrupted = Callable[..., dict[str, bytes]]


@pytest.fixture
def recipe(make_recipe: MakeRecipe, tmp_path: Path) -> Recipe:
    write_rows(tmp_path / "eval.jsonl", HELD_OUT[:2])
    return make_recipe(training=TRAINING, lora={"dropout": 0.1}, data={"eval": ["eval.jsonl"]})


def changed(recipe: Recipe, **training: Any) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=training)})


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    """Return the files of a run that never stopped; each run is made once."""
    made: dict[str, dict[str, bytes]] = {}

    def make(**training: Any) -> dict[str, bytes]:
        key = json.dumps(training)
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            write_rows(folder / "rows.jsonl")
            write_rows(folder / "eval.jsonl", HELD_OUT[:2])
            data = recipe_data(base, training=TRAINING, lora={"dropout": 0.1}, data={"eval": ["eval.jsonl"]})
            recipe = changed(parse_recipe(data, folder=folder), **training)
            train(recipe)
            made[key] = files(recipe.output)
        return made[key]

    return make


def stop_after_one_step(recipe: Recipe, **named: Any) -> Path:
    """Start or resume a run that is asked to stop at once; return its checkpoint."""
    stop = StopRequest()
    stop.signal = 15
    with pytest.raises(StoppedError):
        train(recipe, stop=stop, **named)
    return checkpoints(work_folder(recipe))[-1]


def stopped_at_every_step(recipe: Recipe, steps: int) -> RunResult:
    for step in range(1, steps + 1):
        assert step_of(stop_after_one_step(recipe, resume=step > 1)) == step
    return train(recipe, resume=True)


def files(folder: Path) -> dict[str, bytes]:
    """Return what a run learned and logged; its manifest says that it was resumed."""
    names = ("adapter_model.safetensors", "training_log.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize(("training", "steps"), [({}, 6), pytest.param(THREE_STEPS, 3, marks=pytest.mark.slow)])
def test_a_run_stopped_at_every_step_is_the_run_that_never_stopped(
    recipe: Recipe, uninterrupted: Uninterrupted, training: dict[str, Any], steps: int
) -> None:
    recipe = changed(recipe, **training)
    resumed = stopped_at_every_step(recipe, steps)
    assert resumed.manifest["training"]["resumed_from_step"] == steps
    assert resumed.manifest["training"]["steps"] == steps
    assert files(recipe.output) == uninterrupted(**training)
    assert [line["step"] for line in resumed.log if "eval_loss" in line] == {6: [0, 2, 4, 6], 3: [0, 2, 3]}[steps]
    losses = {line["step"]: line["loss"] for line in resumed.log if "loss" in line}
    # the last step has a line, though it is between two of logging_steps
    assert [*losses] == {6: [1, 4, 6], 3: [1, 3]}[steps]
    assert resumed.manifest["evaluation"][0]["results"]["training loss, last log"] == losses[steps]


@pytest.mark.parametrize(
    ("owner", "method", "broken", "steps"),
    [
        pytest.param(RunningLoss, "on_train_begin", TrainerCallback.on_train_begin, 3, marks=pytest.mark.slow),
        # an epoch has three steps: the fault is a step more within it
        (LoraTrainer, "get_batch_samples", Trainer.get_batch_samples, 2),
    ],
)
def test_without_what_keeps_it_the_resumed_run_is_another(
    recipe: Recipe,
    uninterrupted: Uninterrupted,
    monkeypatch: pytest.MonkeyPatch,
    owner: type,
    method: str,
    broken: Any,
    steps: int,
) -> None:
    training = {"epochs": None, "steps": steps}
    whole = uninterrupted(**training)
    monkeypatch.setattr(owner, method, broken)
    recipe = changed(recipe, **training)
    stopped_at_every_step(recipe, steps)
    assert files(recipe.output) != whole


def test_a_signal_after_the_last_step_leaves_its_checkpoint(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = changed(recipe, epochs=None, steps=1, eval_steps=1)
    stop, evaluate = StopRequest(), LoraTrainer.evaluate

    def asked(trainer: LoraTrainer, *given: Any, **named: Any) -> dict[str, float]:
        stop.signal = 15 * trainer.state.global_step
        return evaluate(trainer, *given, **named)

    monkeypatch.setattr(LoraTrainer, "evaluate", asked)
    with pytest.raises(StoppedError, match="after step 1 of 1"):
        train(recipe, stop=stop)
    assert train(recipe, resume=True).manifest["training"]["steps"] == 1


def test_checkpoints_by_minutes_change_nothing(recipe: Recipe, uninterrupted: Uninterrupted) -> None:
    often = changed(recipe, checkpoint_steps=None, checkpoint_minutes=1e-9)
    stop_after_one_step(often)
    # how often a run saves, and what would stop it, is no part of what it is
    others = {"dry_run": False, "on_oom": "shrink", "stop_at_grad_norm": 1e9, "max_skipped_steps": 3}
    again = changed(recipe, checkpoint_steps=1, **others).model_copy(update={"card": {"license": "mit"}})
    resumed = train(again, resume=True)
    assert resumed.manifest["training"]["resumed_from_step"] == 1
    assert files(often.output) == uninterrupted()


def test_a_checkpoint_is_due_when_the_last_one_is_some_minutes_old() -> None:
    class State:
        is_world_process_zero = True

    class Control:
        should_save = False

    times = iter([0.0, 119.0, 120.0, 125.0, 244.0, 245.0])
    callback = SaveByTime(2, lambda number, how: number, clock=lambda: next(times))
    callback.on_train_begin(None, State(), Control())
    saved = []
    for _ in range(2):
        for _ in range(2):
            control = Control()
            callback.on_step_end(None, State(), control)
            saved.append(control.should_save)
        if len(saved) == 2:
            callback.on_save(None, State(), Control())
    assert saved == [False, True, False, True]


def test_the_clock_of_the_main_process_decides_for_all() -> None:
    class State:
        is_world_process_zero = False

    class Control:
        should_save = False

    control = Control()
    callback = SaveByTime(1, lambda number, how: max(number, 1), clock=lambda: 0.0)
    callback.on_step_end(None, State(), control)
    assert control.should_save
    control = Control()
    callback = SaveByTime(1e-9, lambda number, how: number)
    callback.on_step_end(None, State(), control)
    assert not control.should_save


def damaged(recipe: Recipe, harm: Any) -> tuple[Path, RunResult]:
    """Stop a run twice, do harm to its newest checkpoint, resume."""
    stop_after_one_step(recipe)
    newest = stop_after_one_step(recipe, resume=True)
    harm(newest)
    return newest, train(recipe, resume=True)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (lambda newest: cut(newest / "optimizer.pt"), "optimizer.pt is not as it was written"),
        pytest.param(
            lambda newest: (newest / "rng_state.pth").unlink(),
            "rng_state.pth is not as it was written",
            marks=pytest.mark.slow,
        ),
        (lambda newest: (newest / LIST).unlink(), "it was not written to its end"),
    ],
)
def test_a_broken_checkpoint_is_removed_and_the_one_before_it_taken(
    recipe: Recipe, uninterrupted: Uninterrupted, capsys: pytest.CaptureFixture[str], harm: Any, why: str
) -> None:
    recipe = changed(recipe, **THREE_STEPS)
    newest, resumed = damaged(recipe, harm)
    assert resumed.manifest["training"]["resumed_from_step"] == 1
    assert files(recipe.output) == uninterrupted(**THREE_STEPS)
    assert f"warning: {newest} is removed: {why}" in capsys.readouterr().err


def test_a_checkpoint_runs_no_code(recipe: Recipe, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    def harm(newest: Path) -> None:
        (newest / "optimizer.pt").write_bytes(pickle.dumps(Harm(), protocol=2))
        (newest / LIST).unlink()
        write_json(newest / LIST, listing(newest))

    with pytest.raises(pickle.UnpicklingError):
        damaged(recipe, harm)
    assert not (tmp_path / "harm").exists()


def contents(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_folder_that_waits_to_be_resumed_is_not_touched(recipe: Recipe) -> None:
    stop_after_one_step(recipe)
    before = contents(work_folder(recipe))
    with pytest.raises(InputError, match=r"an unfinished run is there, at step 1\. .*--resume"):
        train(recipe)
    rate = recipe.training.learning_rate
    with pytest.raises(InputError, match=rf"another training\.learning_rate \({rate}, now 0\.02\)"):
        train(changed(recipe, learning_rate=0.02), resume=True)
    assert contents(work_folder(recipe)) == before


def test_an_unfinished_run_of_an_older_version_goes_on_and_names_no_setting(recipe: Recipe) -> None:
    stop_after_one_step(recipe)
    identity = work_folder(recipe) / "run.json"
    identity.write_text(json.dumps({"identity": json.loads(identity.read_text())["identity"]}))
    with pytest.raises(InputError, match="had another recipe, base, precision"):
        train(changed(recipe, learning_rate=0.02), resume=True)
    assert train(recipe, resume=True).manifest["training"]["resumed_from_step"] == 1
    with pytest.raises(InputError, match=r"exists already\. The run came to its end"):
        train(recipe, resume=True)
    with pytest.raises(InputError, match=r"exists already\. Remove it"):
        train(recipe)


def test_other_rows_are_named_as_such(recipe: Recipe) -> None:
    stop_after_one_step(recipe)
    [file] = recipe.files()[:1]
    file.path.write_text(file.path.read_text().partition("\n")[2])
    with pytest.raises(InputError, match="had another set of rows"):
        train(recipe, resume=True)


def test_a_run_on_another_configuration_of_its_base_is_another_run(base: Path, make_recipe: MakeRecipe) -> None:
    """The pin of a local base is the hash of its weights: the configuration may change beside them."""
    folder = base_with(base, Path(make_recipe().folder) / "base")
    recipe = make_recipe(folder)
    before = prepare(recipe).identity
    assert prepare(recipe).identity == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert prepare(recipe).identity != before
    (folder / "config.json").write_text(json.dumps(config))
    assert prepare(changed(recipe, precision="bf16")).identity != before
    assert prepare(changed(recipe, precision="fp32")).identity != before  # `auto` may be another one elsewhere


def test_resuming_without_a_checkpoint_starts_anew(make_recipe: MakeRecipe) -> None:
    run = train(make_recipe(training={"steps": 2}), resume=True)
    assert run.manifest["training"]["resumed_from_step"] is None


def test_only_the_two_newest_checkpoints_stay(recipe: Recipe) -> None:
    for step in range(1, 4):
        stop_after_one_step(recipe, resume=step > 1)
    kept = checkpoints(work_folder(recipe))
    assert [step_of(one) for one in kept] == [2, 3]
    assert [fault_of(one) for one in kept] == ["", ""]


def die(folder: Path, base: Path, *lives: str) -> str:
    """Live through runs that are killed by SIGKILL while they write; return what they print."""
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "eval.jsonl", HELD_OUT[:2])
    data = recipe_data(base, training=TRAINING, lora={"dropout": 0.1}, data={"eval": ["eval.jsonl"]})
    data["training"] |= {"checkpoint_steps": None, "checkpoint_minutes": 1e-9}
    data["evaluation"] = {"generations": 1, "generation_steps": 4, "max_new_tokens": 3, "checks": ["eos"]}
    (folder / "recipe.yaml").write_text(json.dumps(data))
    command = [sys.executable, str(Path(__file__).with_name("dying_runs.py")), str(folder / "recipe.yaml"), *lives]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# the last ones end between the last checkpoint and the last file
LIVES = ("14", "101", "-12", "-4", "30,30,30,30,30,30")


@pytest.mark.slow
def test_a_run_that_is_killed_while_it_writes_goes_on(base: Path, tmp_path: Path) -> None:
    operations = int(die(tmp_path, base, "0", *LIVES))
    assert operations > 130  # so every life but the last is cut short, from the first file to the last folder
    whole = files(tmp_path / "done-0")
    for life in LIVES:
        assert files(tmp_path / f"done-{life}") == whole, life


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_write_goes_on(base: Path, tmp_path: Path) -> None:
    lives = [str(point) for point in range(1, int(die(tmp_path, base, "0")) + 1)]
    die(tmp_path, base, *lives)
    whole = files(tmp_path / "done-0")
    assert [life for life in lives if files(tmp_path / f"done-{life}") != whole] == []
