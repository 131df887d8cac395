"""Half precision that overflows for real, on a CPU too; and what only a GPU can show of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import recipe_data, write_rows
from transformers.utils import is_flash_attn_2_available

from pytest_mistral_lora.checkpoint.base import load_base
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.training.adapter import adapted_layers, adapter_tensors, attach_adapter
from pytest_mistral_lora.training.data import PadRight, RowDataset, load_data
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.step import supervised_losses

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
CUDA = pytest.param("cuda", marks=[pytest.mark.mistral_gpu, NO_CUDA])


def recipe_on(device: str, base: Path, tmp_path: Path, **training: Any) -> Recipe:
    write_rows(tmp_path / "rows.jsonl")
    return parse_recipe(recipe_data(base, training={"device": device, **training}), folder=tmp_path)


def trainer_of(recipe: Recipe, base: Path, tmp_path: Path, change: Any) -> Any:
    from pytest_mistral_lora.checkpoint.backends import Encoder

    data = load_data(recipe, Encoder("mistral-common", CheckpointTokenizer(base)))
    layers = adapted_layers(base, recipe.lora.target_modules)
    model = attach_adapter(change(load_base(base, "fp32", recipe.training.device)), recipe.lora, layers, seed=0)
    return make_trainer(
        model, recipe.training, data.train.encoded, [], pad_id=0, work=tmp_path / "work", progress="none"
    )


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bf16_trains_to_finite_numbers(device: str, base: Path, tmp_path: Path) -> None:
    result = train(recipe_on(device, base, tmp_path, precision="bf16", steps=10))
    assert result.manifest["training"]["precision"] == "bf16"
    assert all(torch.isfinite(tensor).all() for tensor in result.adapter.tensors.values())


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_an_overflow_of_fp16_stops_the_run_and_moves_nothing(device: str, base: Path, tmp_path: Path) -> None:
    def overflows(model: Any) -> Any:
        # 65504 is the largest number of float16: the products of the last norm go beyond it, then those of the head
        model.model.norm.weight.data.fill_(6e4)
        model.lm_head.weight.data.mul_(1000)
        return model.half()

    trainer = trainer_of(recipe_on(device, base, tmp_path, precision="fp32"), base, tmp_path, overflows)
    before = adapter_tensors(trainer.model)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step 1"):
        trainer.train()
    after = adapter_tensors(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert list((tmp_path / "work").glob("checkpoint-*")) == []


@pytest.mark.mistral_gpu
@NO_CUDA
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash-attn is not installed here")
def test_flash_attention_takes_rows_that_are_padded_on_the_right(base: Path, tmp_path: Path) -> None:
    losses = {}
    for attention in ("sdpa", "flash_attention_2"):

        def implementation(model: Any, name: str = attention) -> Any:
            model = model.bfloat16()
            model.set_attn_implementation(name)
            return model

        trainer = trainer_of(recipe_on("cuda", base, tmp_path, precision="bf16"), base, tmp_path, implementation)
        dataset = RowDataset(trainer.train_dataset._encoded)
        batch = PadRight(0)([dataset[index] for index in range(len(dataset))])
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            found, _ = supervised_losses(trainer.model, {name: one.cuda() for name, one in batch.items()})
        losses[attention] = found.mean().item()
    assert losses["flash_attention_2"] == pytest.approx(losses["sdpa"], rel=2e-2)
