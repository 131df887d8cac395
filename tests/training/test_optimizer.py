"""Optimizer and schedule: what the recipe says is what the loop uses, and what the manifest says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import MakeRecipe

from pytest_mistral_lora.records.verify import verify
from pytest_mistral_lora.training.callbacks import StopAtNonFinite
from pytest_mistral_lora.training.loop import trainer_arguments
from pytest_mistral_lora.training.run import RunResult, train
from pytest_mistral_lora.training.run_folder import work_folder


def test_adamw_is_fused_with_the_recipes_numbers(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}

    def keep(self: Any, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        found.update(optimizer.param_groups[0], type=type(optimizer.optimizer))

    monkeypatch.setattr(StopAtNonFinite, "on_train_end", keep)
    training = {"steps": 2, "betas": [0.8, 0.95], "epsilon": 1e-6, "weight_decay": 0.1}
    result = train(make_recipe(training=training))
    assert found["type"] is torch.optim.AdamW
    assert found["fused"] is True
    assert found["betas"] == (0.8, 0.95)
    assert found["eps"] == 1e-6
    assert found["weight_decay"] == 0.1
    assert result.manifest["training"]["optimizer"] == "AdamW, betas 0.8 and 0.95, epsilon 1e-06"


def test_the_default_is_named_as_before(run: RunResult) -> None:
    assert run.manifest["training"]["optimizer"] == "AdamW, betas 0.9 and 0.999, epsilon 1e-08"


@pytest.mark.parametrize("ratio", [0.01, 0.25, 0.3, 0.999])
@pytest.mark.parametrize("steps", [1, 7, 10, 1000])
def test_a_warmup_ratio_is_as_many_steps_as_transformers_makes_of_it(
    make_recipe: MakeRecipe, tmp_path: Path, ratio: float, steps: int
) -> None:
    training = make_recipe(training={"warmup_ratio": ratio, "steps": steps}).training
    arguments = trainer_arguments(training, has_held_out=False, work=tmp_path)
    assert arguments.get_warmup_steps(steps) == training.warmup(steps) == math.ceil(steps * ratio)


def rates(result: RunResult) -> list[float]:
    return [line["learning_rate"] for line in result.log if "learning_rate" in line]


def test_a_cosine_ends_at_the_recipes_fraction_and_the_manifest_says_so(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    training = {
        "steps": 10,
        "schedule": "cosine",
        "warmup_ratio": 0.2,
        "min_learning_rate_ratio": 0.25,
        "logging_steps": 1,
        "learning_rate": 1e-2,
    }
    result = train(make_recipe(training=training))
    assert max(rates(result)) == pytest.approx(1e-2)
    assert rates(result)[1] < rates(result)[2]
    assert rates(result)[-1] == pytest.approx(2.5e-3, rel=0.15)
    assert result.manifest["training"]["schedule"] == {
        "name": "cosine",
        "warmup_steps": 2,
        "total_steps": 10,
        "min_learning_rate_ratio": 0.25,
    }
    assert {fact.state for fact in verify(result.output, base=base, dataset=tmp_path)} == {"match"}


@pytest.mark.parametrize("warmup", [{"warmup_steps": 4}, {"warmup_ratio": 0.4}])
def test_a_constant_rate_rises_first_where_the_recipe_says_so(make_recipe: MakeRecipe, warmup: dict[str, Any]) -> None:
    result = train(make_recipe(training={"steps": 10, "logging_steps": 1, **warmup}))
    assert rates(result)[0] < rates(result)[2] < rates(result)[-1] == 0.01
    assert result.manifest["training"]["schedule"]["warmup_steps"] == 4


@pytest.mark.filterwarnings("ignore:mtime may not be reliable:UserWarning")  # two checkpoints within a second
@pytest.mark.parametrize(
    "sections",
    [
        pytest.param(
            {
                "training": {
                    "schedule": "cosine",
                    "min_learning_rate_ratio": 0.1,
                    "warmup_ratio": 0.3,
                    "weight_decay": 0.1,
                }
            },
            marks=pytest.mark.slow,
        ),
        {"lora": {"dora": True, "modules_to_save": ["lm_head"], "dropout": 0.1}, "training": {"precision": "bf16"}},
    ],
)
def test_an_interrupted_run_resumes_to_the_same_adapter(
    make_recipe: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sections: dict[str, Any]
) -> None:
    training = {"steps": 5, "batch_size": 2, "micro_batch_tokens": 1, "checkpoint_steps": 2, **sections["training"]}
    recipe = make_recipe(**{**sections, "training": training})
    whole = train(recipe)
    whole.output.rename(tmp_path / "whole")

    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StopAtNonFinite, "on_step_begin", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert (work_folder(recipe) / "checkpoint-2").is_dir()
    resumed = train(recipe, resume=True)
    assert resumed.manifest["training"]["resumed_from_step"] == 2
    assert resumed.manifest["lora"]["tensors_sha256"] == whole.manifest["lora"]["tensors_sha256"]
    assert list(resumed.log) == list(whole.log)
