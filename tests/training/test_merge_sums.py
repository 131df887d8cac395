"""Each element of a merged model is the rounded sum of base and adapter: the smallest error is found, in any matrix."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8_bases import fp8_copy
from merge_plans import OPTIONS, planned, write_adapter, write_base
from safetensors.torch import load_file, save_file
from sampling import sampled

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.weights import DTYPES, Weights, weight_files
from pytest_mistral_lora.errors import InputError, MergeError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.merged_weights import inexact_tensors
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS
from pytest_mistral_lora.training.merge.plan import LowRankChange, write_weights
from pytest_mistral_lora.training.merge.proof import check_sums

Q = "model.layers.0.self_attn.q_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
"""A matrix with an adapter, and one without."""


def written(adapter: Path, base: Path, folder: Path, dtype: str, changes: Any = None) -> Path:
    folder.mkdir()
    changes = planned(adapter, base) if changes is None else changes
    write_weights(folder, BaseFolder(base).weights, Weights([adapter / ADAPTER_TENSORS]), changes, dtype)
    return folder


def inexact(merged: Path, base: Path, adapter: Path) -> dict[str, tuple[int, float]]:
    found = inexact_tensors(Weights(weight_files(merged)), BaseFolder(base).weights, AdapterFolder(adapter))
    return {one.name: (one.different, one.farthest) for one in found}


@pytest.fixture(scope="module", params=DTYPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Merged model, base and adapter."""
    folder = tmp_path_factory.mktemp("case")
    base = write_base(folder / "base")
    adapter = write_adapter(folder / "adapter", base)
    return written(adapter, base, folder / "merged", request.param), base, adapter


@pytest.mark.parametrize(
    "options", sampled([{}, *OPTIONS[1:]], ("{}", "{'use_dora': True}", "{'layers_to_transform': [1]}"))
)
def test_a_merge_is_exact_with_every_option(tmp_path: Path, options: dict[str, Any]) -> None:
    base = write_base(tmp_path / "base")
    adapter = write_adapter(tmp_path / "adapter", base, **options)
    for dtype in DTYPES:
        assert inexact(written(adapter, base, tmp_path / dtype, dtype), base, adapter) == {}


def test_an_element_is_the_nearest_number_to_the_sum_in_whole_numbers(case: tuple[Path, Path, Path]) -> None:
    merged, base, adapter = case
    tensors = load_file(adapter / ADAPTER_TENSORS)
    a, b = (tensors[f"base_model.model.{Q.removesuffix('weight')}lora_{one}.weight"] for one in "AB")
    old, new = (load_file(folder / "model.safetensors")[Q] for folder in (base, merged))
    for row, column in [(0, 0), (3, 17), (12, 9), (31, 31)]:
        products = (Fraction(x.item()) * Fraction(y.item()) for x, y in zip(b[row], a[:, column], strict=True))
        exact = Fraction(old[row, column].item()) + Fraction(6, 4) * sum(products)
        number = new[row, column]
        infinity = torch.tensor([-math.inf, math.inf], dtype=new.dtype)
        around = [Fraction(one.item()) for one in torch.nextafter(number, infinity)]
        assert all(abs(Fraction(number.item()) - exact) <= abs(one - exact) for one in around)


def changed(case: tuple[Path, Path, Path], folder: Path, name: str, change: Callable[[torch.Tensor], Any]) -> Path:
    copy = Path(shutil.copytree(case[0], folder))
    tensors = load_file(copy / "model.safetensors")
    made = change(tensors[name])
    tensors[name] = tensors[name] if made is None else made.to(tensors[name].dtype).contiguous()
    save_file(tensors, copy / "model.safetensors")
    return copy


def _next(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3, 5] = torch.nextafter(tensor[3, 5], torch.tensor(math.inf, dtype=tensor.dtype))
    return tensor


def _nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[0, 0] = math.nan
    return tensor


@pytest.mark.parametrize("name", [Q, DOWN, "model.norm.weight"])
@pytest.mark.parametrize("factor", [1.05, 1.01])
def test_a_matrix_that_is_off_by_one_percent_is_found(
    case: tuple[Path, Path, Path], tmp_path: Path, name: str, factor: float
) -> None:
    merged = changed(case, tmp_path / "merged", name, lambda one: one.float() * factor)
    [(found, (different, farthest))] = inexact(merged, *case[1:]).items()
    assert found == name
    assert different > load_file(case[0] / "model.safetensors")[name].numel() / 2
    assert farthest >= 1


@pytest.mark.parametrize("name", [Q, DOWN])
@pytest.mark.parametrize(("change", "least"), [(_next, 0.5), (_nan, math.inf)])
def test_one_element_that_is_off_by_one_place_is_found(
    case: tuple[Path, Path, Path], tmp_path: Path, name: str, change: Callable[[torch.Tensor], Any], least: float
) -> None:
    merged = changed(case, tmp_path / "merged", name, change)
    [(found, (different, farthest))] = inexact(merged, *case[1:]).items()
    assert (found, different) == (name, 1)
    assert least <= farthest <= max(1.5, least)


@pytest.mark.parametrize("factor", [1.05, 1.01, 1.001])
def test_a_change_that_is_off_by_a_thousandth_is_found(
    case: tuple[Path, Path, Path], tmp_path: Path, factor: float
) -> None:
    _, base, adapter = case
    dtype = str(next(iter(load_file(case[0] / "model.safetensors").values())).dtype).removeprefix("torch.")
    changes = planned(adapter, base)
    assert isinstance(changes[Q], LowRankChange)
    changes[Q] = replace(changes[Q], scaling=changes[Q].scaling * factor)
    merged = written(adapter, base, tmp_path / "merged", dtype, changes)
    assert list(inexact(merged, base, adapter)) == [Q]
    with pytest.raises(MergeError, match=rf"{Q} is not the rounded sum .* in [\d,]+ of 1,024 elements"):
        check_sums(Weights(weight_files(merged)), BaseFolder(base).weights, AdapterFolder(adapter))


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_into_an_fp8_base_is_exact_and_a_wrong_scale_is_found(
    tmp_path: Path, block: int | None, dtype: str
) -> None:
    base = fp8_copy(write_base(tmp_path / "full"), tmp_path / "base", block=block)
    adapter = write_adapter(tmp_path / "adapter", base)
    merged = written(adapter, base, tmp_path / "merged", dtype)
    assert inexact(merged, base, adapter) == {}
    case = (merged, base, adapter)
    # a merge that rounded the scale of a matrix to bfloat16
    wrong = changed(case, tmp_path / "wrong", DOWN, lambda one: one.float() * (1 + 2**-8))
    assert list(inexact(wrong, base, adapter)) == [DOWN]


def test_what_is_not_in_both_or_in_another_form_is_an_error(case: tuple[Path, Path, Path], tmp_path: Path) -> None:
    merged = Path(shutil.copytree(case[0], tmp_path / "merged"))
    tensors = load_file(merged / "model.safetensors")
    for other, said in [
        ({name: one for name, one in tensors.items() if name != Q}, f"{Q} is not in base and merged model"),
        (tensors | {Q: tensors[Q][:8].contiguous()}, rf"{Q} is a tensor of \w+ \[8, 32\]; expected \[32, 32\]"),
        (tensors | {Q: tensors[Q].to(torch.int8)}, rf"{Q} is a tensor of int8 .* in float32, bfloat16, float16"),
    ]:
        save_file(other, merged / "model.safetensors")
        with pytest.raises(InputError, match=said):
            inexact(merged, *case[1:])
    half = Path(shutil.copytree(case[2], tmp_path / "half"))
    parts = load_file(half / ADAPTER_TENSORS)
    lost = next(name for name in parts if name.endswith("lora_B.weight"))
    save_file({name: one for name, one in parts.items() if name != lost}, half / ADAPTER_TENSORS)
    with pytest.raises(InputError, match=r"only base_model.*lora_A\.weight; expected A and B"):
        inexact(case[0], case[1], half)
