from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_runs import MakeRecipe

from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.training.adapter import adapted_layers, attach_adapter
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.rows.loading import load_data
from pytest_mistral_lora.training.run import train, work_folder
from pytest_mistral_lora.training.step.forward import collate, step_rows, supervised_losses
from pytest_mistral_lora.training.step.packing import StepRow
from pytest_mistral_lora.training.step.trainer import LoraTrainer


class Recorder:
    """Keeps the gradients of the first optimizer step."""

    def __new__(cls) -> Any:
        from transformers import TrainerCallback

        class Keeps(TrainerCallback):  # type: ignore[misc]
            def __init__(self) -> None:
                self.gradients: dict[str, torch.Tensor] = {}

            def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if not self.gradients:
                    named = model.named_parameters()
                    self.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}

        return Keeps()


def trainer_of(recipe: Recipe, base: Path, tmp_path: Path) -> Any:
    encoder = make_encoder("mistral-common", CheckpointTokenizer(base))
    data = load_data(recipe, encoder)
    layers = adapted_layers(base, recipe.lora.target_modules)
    model = attach_adapter(load_base(base, "fp32", "cpu"), recipe.lora, layers, seed=0)
    with torch.no_grad():  # away from the start, where lora_A has no gradient
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(1))
    return make_trainer(
        model,
        recipe.training,
        data.train.encoded,
        data.held_out.encoded,
        work=tmp_path / "work",
        progress="none",
    )


def first_gradients(recipe: Recipe, base: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    trainer, recorder = trainer_of(recipe, base, tmp_path), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    gradients: dict[str, torch.Tensor] = recorder.gradients
    return gradients


ONE_STEP = {"steps": 1, "batch_size": 4, "max_grad_norm": 0}


def relative_error(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    return max((left[name] - right[name]).abs().max().item() / right[name].abs().max().item() for name in right)


@pytest.mark.parametrize("tokens", [1, 40])
def test_micro_batches_only_split_the_sum(make_recipe: MakeRecipe, base: Path, tmp_path: Path, tokens: int) -> None:
    whole = first_gradients(make_recipe(training=ONE_STEP), base, tmp_path)
    split = first_gradients(make_recipe(training={**ONE_STEP, "micro_batch_tokens": tokens}), base, tmp_path)
    assert len(whole) == 16
    assert relative_error(split, whole) < 1e-5


def test_a_mean_of_means_would_not_pass(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mean_of_means(self: Any, model: Any, rows: Any, *_: Any, **__: Any) -> Any:
        return supervised_losses(model, rows)[0].mean() / self.current_gradient_accumulation_steps

    whole = first_gradients(make_recipe(training=ONE_STEP), base, tmp_path)
    monkeypatch.setattr(LoraTrainer, "compute_loss", mean_of_means)
    split = first_gradients(make_recipe(training={**ONE_STEP, "micro_batch_tokens": 1}), base, tmp_path)
    assert relative_error(split, whole) > 1e-2


def test_activation_checkpointing_changes_no_gradient(make_recipe: MakeRecipe, base: Path, tmp_path: Path) -> None:
    plain = first_gradients(make_recipe(training=ONE_STEP), base, tmp_path)
    again = first_gradients(make_recipe(training={**ONE_STEP, "activation_checkpointing": True}), base, tmp_path)
    assert len(again) == 16
    assert relative_error(again, plain) < 1e-6


def rows_of(trainer: Any) -> list[StepRow]:
    dataset = trainer.train_dataset
    return step_rows(collate([dataset[index] for index in range(len(dataset))]))


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


def poisoned(base: Path, folder: Path, name: str, value: float) -> Path:
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).hardlink_to(file)
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_one_infinite_weight_stops_the_run_and_nothing_is_saved(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(poisoned(base, tmp_path / "bad", "model.norm.weight", float("inf")))
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step 1"):
        train(recipe)
    assert not recipe.output.exists()
    assert list(work_folder(recipe).glob("checkpoint-*")) == []
    assert (work_folder(recipe) / "failure.json").is_file()


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
