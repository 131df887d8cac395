"""Half precision that overflows for real, on a CPU too; and what only a GPU can show of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import recipe_data, trainer_of, write_rows

from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.training.adapter import adapter_tensors
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.step import Segment
from pytest_mistral_lora.training.step import forward as attention
from pytest_mistral_lora.training.step.forward import collate, step_rows, supervised_losses

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device here")
CUDA = pytest.param("cuda", marks=[pytest.mark.mistral_gpu, NO_CUDA])


def recipe_on(device: str, base: Path, tmp_path: Path, **training: Any) -> Recipe:
    write_rows(tmp_path / "rows.jsonl")
    return parse_recipe(recipe_data(base, training={"device": device, **training}), folder=tmp_path)


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
def test_the_fused_kernel_keeps_rows_apart_as_segments_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_on("cuda", base, tmp_path, precision="bf16")
    trainer = trainer_of(recipe, base, tmp_path, lambda model: model.bfloat16())
    rows = step_rows(collate(list(trainer.train_dataset)))
    losses = {}
    for fused in (True, False):
        if not fused:
            monkeypatch.setattr(attention, "_fused_varlen", lambda: None)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            losses[fused] = supervised_losses(trainer.model, rows)[0]
    assert torch.allclose(losses[True], losses[False], rtol=2e-2, atol=2e-2)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that is taken for one of a GPU, so that the choice of the kernel can be seen anywhere."""

    is_cuda = True


def attended(query: torch.Tensor, dropout: float) -> torch.Tensor:
    """Attention of two packed rows of four tokens each; the query is key and value, too."""
    segments = (Segment(0, 4, (0, 0)), Segment(4, 8, (4, 4)))
    module = torch.nn.Module().train()
    how = {"segments": segments, "scaling": 0.25, "dropout": dropout, "is_causal": True}
    return attention.attend(module, query, query, query, None, **how)[0]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_dropout_of_attention_is_drawn_by_every_kernel(device: str) -> None:
    query = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16, device=device)
    assert torch.equal(attended(query, 0.0), attended(query, 0.0))
    # no fused kernel knows dropout: one that was used would draw none, and both passes would be alike
    assert not torch.equal(attended(query, 0.5), attended(query, 0.5))


def test_the_fused_kernel_is_not_asked_for_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor] = []

    def kernel(query: torch.Tensor, *more: Any) -> torch.Tensor:
        asked.append(query)
        return query.transpose(1, 2)

    monkeypatch.setattr(attention, "_fused_varlen", lambda: kernel)
    query = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16).as_subclass(OnCuda)
    attended(query, 0.5)
    assert not asked
    attended(query, 0.0)
    assert len(asked) == 1
