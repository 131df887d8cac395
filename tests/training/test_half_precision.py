"""Half precision that overflows for real, on a CPU too; and what only a GPU can show of training."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
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
            monkeypatch.setattr(attention, "_fused_varlen", lambda capability: None)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            losses[fused] = supervised_losses(trainer.model, rows)[0]
    assert torch.allclose(losses[True], losses[False], rtol=2e-2, atol=2e-2)


class OnCuda(torch.Tensor):
    """A tensor of the CPU that is taken for one of a GPU, so that the choice of the kernel can be seen anywhere."""

    is_cuda = True


STARTS = torch.tensor([0, 4, 8], dtype=torch.int32)


def attended(query: torch.Tensor, dropout: float) -> torch.Tensor:
    """Attention of two packed rows of four tokens each; the query is key and value, too."""
    segments = (Segment(0, 4, (0, 0)), Segment(4, 8, (4, 4)))
    module = torch.nn.Module().train()
    how = {"segments": segments, "scaling": 0.25, "dropout": dropout, "is_causal": True, "segment_starts": STARTS}
    return attention.attend(module, query, query, query, None, **how)[0]


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_dropout_of_attention_is_drawn_by_every_kernel(device: str) -> None:
    query = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16, device=device)
    assert torch.equal(attended(query, 0.0), attended(query, 0.0))
    # no fused kernel knows dropout: one that was used would draw none, and both passes would be alike
    assert not torch.equal(attended(query, 0.5), attended(query, 0.5))


def test_the_fused_kernel_is_not_asked_for_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def kernel(query: torch.Tensor, *more: Any) -> torch.Tensor:
        asked.append(more)
        return query.transpose(1, 2)

    monkeypatch.setattr(attention, "_fused_varlen", lambda capability: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    query = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16).as_subclass(OnCuda)
    attended(query, 0.5)
    assert not asked
    attended(query, 0.0)
    [(_, _, starts, longest, window, scaling)] = asked
    assert starts is STARTS
    assert (longest, window, scaling) == (4, None, 0.25)


def flash(*given: Any, **named: Any) -> torch.Tensor:
    return torch.zeros(8, 2, 16)


@pytest.mark.parametrize(
    ("capability", "packages", "used"),
    [
        # a T4 and a V100, for which precision: fp16 is: each kernel refuses them
        ((7, 5), {"flash_attn": flash}, None),
        ((7, 0), {}, None),
        ((8, 6), {"flash_attn": flash, "flash_attn_interface": flash}, "flash_attn"),
        ((9, 0), {"flash_attn": flash, "flash_attn_interface": flash}, "flash_attn_interface"),
        ((9, 0), {"flash_attn": flash}, "flash_attn"),
        # a package of the name without the function, as that of version 4 alone
        ((8, 0), {"flash_attn": None}, "torch"),
        ((9, 0), {"flash_attn": None, "flash_attn_interface": None}, "torch"),
        ((12, 0), {}, "torch"),
    ],
)
def test_the_kernel_is_one_that_the_gpu_can_run(
    capability: tuple[int, int], packages: dict[str, Any], used: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def recorded(name: str) -> Any:
        return lambda *given, **named: asked.append(name) or flash()

    for name in ("flash_attn", "flash_attn_interface"):
        module: Any = None  # an import of it then fails
        if name in packages:
            module = ModuleType(name)
            if packages[name]:
                module.flash_attn_varlen_func = recorded(name)
        monkeypatch.setitem(sys.modules, name, module)
    varlen = recorded("torch")
    varlen.__annotations__ = {"window_size": tuple}
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    attention._fused_varlen.cache_clear()
    try:
        query = torch.randn(1, 2, 8, 16, dtype=torch.float16).as_subclass(OnCuda)
        assert attended(query, 0.0).shape == (1, 8, 2, 16)
    finally:
        attention._fused_varlen.cache_clear()
    assert asked == ([used] if used else [])


class OfCuda(OnCuda):
    """Such a tensor that the kernels of the CPU are not asked for, either."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "capability", "repeated"),
    [
        (torch.float32, (9, 0), True),
        # a T4: FlashAttention refuses it
        (torch.float16, (7, 5), True),
        (torch.bfloat16, (8, 0), False),
    ],
)
def test_grouped_heads_are_repeated_for_the_kernels_that_take_none(
    dtype: torch.dtype, capability: tuple[int, int], repeated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, bool]] = []
    sound = torch.nn.functional.scaled_dot_product_attention

    def recorded(query: Any, key: Any, value: Any, **named: Any) -> Any:
        asked.append((key.shape[1], named.get("enable_gqa", False)))
        return sound(query, key, value, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "_fused_varlen", lambda capability: None)
    module: Any = torch.nn.Module()
    module.num_key_value_groups = 4
    query, key, value = torch.randn(8, 6, 16).to(dtype)[None], *torch.randn(2, 1, 2, 6, 16).to(dtype)
    how: dict[str, Any] = {"segments": (Segment(0, 2), Segment(2, 6)), "scaling": 0.25, "dropout": 0.0}
    on_cuda = [one.as_subclass(OfCuda) for one in (query, key, value)]
    found = attention.attend(module, *on_cuda, None, **how)[0].as_subclass(torch.Tensor)
    assert asked == [(8, False) if repeated else (2, True)] * 2
    expected = attention.attend(module, query, key, value, None, **how)[0]
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_the_starts_of_segments_are_sent_to_a_gpu_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.Tensor] = []
    monkeypatch.setattr(attention, "_sent", lambda tensor, device: sent.append(tensor) or tensor)
    found = attention.segment_arguments((Segment(0, 4), Segment(4, 9)), torch.device("cuda"))
    assert found["segment_starts"].dtype == torch.int32
    assert [one.tolist() for one in sent] == [[0, 4, 9]]
    assert "segment_starts" not in attention.segment_arguments((Segment(0, 4),), torch.device("cpu"))
