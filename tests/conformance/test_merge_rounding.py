"""A sound merge is base plus product in whichever order it rounds; a scale that is further off than rounding is not."""

from __future__ import annotations

import itertools
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft_bases import write_base_and_lora
from safetensors.torch import load_file, save_file
from sampling import sampled, sampled_case
from transformers import MistralForCausalLM

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.merged.checks import cases
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.merge.plan import plan_merge, write_weights

WEIGHTS = "model.safetensors"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Make a base and an adapter, once for each dtype and configuration."""
    folders: dict[str, Path] = {}

    def make(dtype: torch.dtype, **settings: Any) -> Path:
        key = repr((dtype, settings))
        if key not in folders:
            folder = folders[key] = tmp_path_factory.mktemp("rounding")
            targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
            values = {"r": 8, "lora_alpha": 12, "target_modules": targets, **settings}
            write_base_and_lora(folder, dtype, **values)
        return folders[key]

    return make


def merged_by_peft(
    folder: Path,
    dtype: torch.dtype,
    *,
    loaded: torch.dtype,
    autocast: bool = True,
    safe: bool = False,
    factor: float = 1.0,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MistralForCausalLM.from_pretrained(folder / "base", dtype=loaded)
        adapted = PeftModel.from_pretrained(model, folder / "lora", autocast_adapter_dtype=autocast)
        for module in adapted.modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] *= factor
        shutil.rmtree(folder / "merged", ignore_errors=True)
        adapted.merge_and_unload(safe_merge=safe).to(dtype).save_pretrained(folder / "merged")


def product_of(folder: Path) -> Result:
    merged, adapter = (AdapterFolder(folder / name, BaseFolder(folder / "base")) for name in ("merged", "lora"))
    result = cases(merged, [adapter])["adapter-product"]()
    assert not result.not_checked
    return result


def merges() -> Iterator[Any]:
    """Yield dtype, settings, loaded, autocast and safe of each merge; the sweeps take the other kinds in each way."""
    kinds = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "small": {"std": 5e-4}}
    for dtype, kind, *way in itertools.product(DTYPES, kinds, ("own", "float32"), (False, True), (False, True)):
        quick = (kind == "plain" and dtype == torch.bfloat16) or way == ["own", False, False]
        name = "-".join(map(str, (dtype, kind, *way)))
        yield sampled_case(dtype, kinds[kind], *way, name=name, is_kept=quick)


@pytest.mark.parametrize(("dtype", "settings", "loaded", "autocast", "safe"), [*merges()])
def test_each_order_in_which_peft_rounds_is_no_finding(
    made: Made, dtype: torch.dtype, settings: dict[str, Any], loaded: str, autocast: bool, safe: bool
) -> None:
    folder = made(dtype, **settings)
    merged_by_peft(folder, dtype, loaded=dtype if loaded == "own" else torch.float32, autocast=autocast, safe=safe)
    assert not product_of(folder).findings


@pytest.mark.parametrize("factor", [1.05, 0.9])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["plain", "dora"])
@pytest.mark.parametrize("dtype", sampled(DTYPES, ("torch.bfloat16",)))
def test_a_scale_that_no_rounding_explains_is_found(
    made: Made, dtype: torch.dtype, settings: dict[str, Any], factor: float
) -> None:
    folder = made(dtype, **settings)
    merged_by_peft(folder, dtype, loaded=dtype, factor=factor)
    assert {finding.rule for finding in product_of(folder).findings} == {"ML434"}


def exact(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return (weight.double() + scale * b.double() @ a.double()).to(weight.dtype)


def as_on_a_gpu(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    a, b = a.to(weight.dtype), b.to(weight.dtype)
    return weight + ((b.float() @ a.float()).to(weight.dtype) * scale).to(weight.dtype)


def scale_rounded(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return as_on_a_gpu(weight, a, b, float(torch.tensor(scale).to(weight.dtype)))


def factors_rounded(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return (weight.float() + scale * (b.bfloat16().float() @ a.bfloat16().float())).to(weight.dtype)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "lora_alpha": 10}], ids=["plain", "rslora"])
@pytest.mark.parametrize("add", [exact, as_on_a_gpu, scale_rounded, factors_rounded])
@pytest.mark.parametrize("dtype", sampled(DTYPES, ("torch.bfloat16",)))
def test_a_sound_merge_in_another_order_is_no_finding(
    made: Made, dtype: torch.dtype, add: Callable[..., torch.Tensor], settings: dict[str, Any]
) -> None:
    folder = made(dtype, **settings)
    merged_by_peft(folder, dtype, loaded=dtype)
    scale = 10 / 8**0.5 if settings else 12 / 8
    adapter = load_file(folder / "lora" / "adapter_model.safetensors")
    tensors = load_file(folder / "base" / WEIGHTS)
    for name in tensors:
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
        if key in adapter:
            tensors[name] = add(tensors[name], adapter[key], adapter[key.replace("_A", "_B")], scale)
    save_file(tensors, folder / "merged" / WEIGHTS)
    assert not product_of(folder).findings


@pytest.mark.parametrize("dtype", sampled(DTYPES, ("torch.bfloat16",)))
def test_our_own_merge_is_no_finding(made: Made, dtype: torch.dtype) -> None:
    folder = made(dtype, use_rslora=True)
    merged_by_peft(folder, dtype, loaded=dtype)
    base, adapter = BaseFolder(folder / "base"), AdapterFolder(folder / "lora")
    name = str(dtype).removeprefix("torch.")
    (folder / "merged" / WEIGHTS).unlink()
    write_weights(folder / "merged", base.weights, adapter.weights, plan_merge(adapter, base), name)
    assert not product_of(folder).findings
