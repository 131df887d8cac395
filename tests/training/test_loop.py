from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import MakeRecipe, rows_of, trainer_of

from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.step.forward import supervised_losses


def test_held_out_loss_is_the_mean_over_tokens(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(make_recipe(training={"batch_size": 2}), base, tmp_path)
    with torch.no_grad():
        expected = supervised_losses(trainer.model.eval(), rows_of(trainer))[0].mean().item()
    found = trainer.evaluate(trainer.train_dataset)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "no"), ("bf16", "bf16")])
def test_the_recipe_decides_the_precision_and_no_launcher(
    precision: str,
    expected: str,
    make_recipe: MakeRecipe,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if precision == "fp32" else "no")
    trainer = trainer_of(make_recipe(training={"precision": precision}), base, tmp_path)
    assert trainer.accelerator.mixed_precision == expected


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(make_recipe(training={"steps": 1}), base, tmp_path)
    parameter = next(p for p in trainer.model.parameters() if p.requires_grad)
    before = parameter.detach().clone()
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match="a gradient is not finite at step 1"):
        trainer.train()
    assert torch.equal(parameter, before)


def test_learning_rate_of_zero_moves_nothing_and_is_an_error(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(training={"learning_rate": 0.0, "steps": 2})
    with pytest.raises(TrainingError, match="did not move"):
        train(recipe)
    assert not recipe.output.exists()
