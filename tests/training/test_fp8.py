"""FP8 bases: dequantised exactly, in a layout that is checked; any other quantisation is refused by name."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from cut_sentencepiece import cut_v3
from fp8_bases import BLOCK, GATE0, Q0, SCALE, WEIGHTS, by_formula, changed, fp8_config, fp8_copy, reconfigured
from packaging.version import Version
from safetensors.torch import load_file
from sampling import sampled
from tiny_runs import MakeRecipe, recipe_data, write_rows
from transformers import AutoModelForCausalLM

from pytest_mistral_lora.checkpoint.architectures import TEXT_MODELS, Architecture
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.fp8 import DequantizedWeights, dequantize
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import PinError
from pytest_mistral_lora.training.prepare import plan_run
from pytest_mistral_lora.training.recipe import parse_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_the_product_rounded_once(
    fp8_bases: dict[int | None, Path], block: int | None, precision: Any
) -> None:
    folder = fp8_bases[block]
    model = load_base(BaseFolder(folder), precision, "cpu")
    found, expected = model.state_dict(), by_formula(folder, block)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.to(DTYPES[precision])), name
    assert not hasattr(model.config, "quantization_config")
    assert model.name_or_path == str(folder)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="older versions do not dequantise on a CPU"
)
@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_are_those_of_transformers(
    fp8_bases: dict[int | None, Path], block: int | None, precision: Any
) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(fp8_bases[block], dtype=DTYPES[precision]).state_dict()
    ours = load_base(BaseFolder(fp8_bases[block]), precision, "cpu").state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="it has no such operation")
@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize("form", ["float", "ue8m0"])
def test_layouts_that_transformers_writes_are_read(
    base: Path, fp8_bases: dict[int | None, Path], tmp_path: Path, block: int | None, form: str
) -> None:
    """Its own quantisation writes one scale as a matrix of one number, and ue8m0 as powers of two in a byte."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    settings = {"weight_block_size": (block, block) if block else None, "scale_fmt": form}
    quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(**settings), pre_quantized=True)
    folder = Path(shutil.copytree(fp8_bases[block], tmp_path / "base"))
    full = load_file(base / WEIGHTS)

    def quantise_again(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(SCALE)]:
            weight = name.replace(SCALE, "weight")
            tensors |= Fp8Quantize(quantizer).convert({weight: full[weight]})

    changed(folder, quantise_again)
    reconfigured(folder, fp8_config(block, scale_fmt=form))
    stored, weights = load_file(folder / WEIGHTS), BaseFolder(folder).weights
    for name in (f"{Q0}.weight", f"{GATE0}.weight"):
        scale = stored[name.replace("weight", SCALE)]
        assert scale.shape == ((full[name].shape[0] // block, full[name].shape[1] // block) if block else (1, 1))
        # three bits after the first: half a unit is 1 / 16 of a number, and less near zero is lost
        assert (weights[name] - full[name]).abs().max() < full[name].abs().max() / 16
        spread = scale.float() if block is None else torch.kron(scale.float(), torch.ones(block, block))
        assert torch.equal(weights[name], stored[name].float() * spread)


def test_a_scale_cannot_be_used_for_another_layout(fp8_bases: dict[int | None, Path]) -> None:
    stored = load_file(fp8_bases[BLOCK] / WEIGHTS)
    matrix, grid = stored[f"{GATE0}.weight"], stored[f"{GATE0}.{SCALE}"]
    for wrong, block in ((grid, None), (grid.mean(), (BLOCK, BLOCK)), (grid.T, (BLOCK, BLOCK)), (grid, (64, 64))):
        with pytest.raises((ValueError, RuntimeError)):
            dequantize(matrix, wrong, block)


def with_scale(value: Callable[[torch.Tensor], torch.Tensor], layer: str = GATE0) -> Callable[[Any], Any]:
    return lambda tensors: tensors.update({f"{layer}.{SCALE}": value(tensors[f"{layer}.{SCALE}"])})


def number_at(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda scale: scale.clone().reshape(-1).index_fill(0, torch.tensor([0]), value).reshape(scale.shape)


def renamed(old: str, new: str) -> Callable[[Any], Any]:
    return lambda tensors: tensors.update({f"{Q0}.{new}": tensors.pop(f"{Q0}.{old}")})


UNTOUCHED = object()
MUTANTS: dict[str, tuple[int | None, Any, Any, str]] = {
    # of each: the layout, a change of the tensors, another quantization_config, and words of the refusal
    "a scale is missing": (None, lambda one: one.pop(f"{Q0}.{SCALE}"), UNTOUCHED, f"{Q0}.weight is in FP8, and its"),
    "a scale of another format": (None, renamed(SCALE, "weight_scale"), UNTOUCHED, r"missing; beside it are .*weight_"),
    "one number for blocks": (BLOCK, with_scale(lambda one: one.mean()), UNTOUCHED, r"shape \[\]; expected \[8, 4\]"),
    "one number in a matrix for blocks": (
        BLOCK,
        with_scale(lambda one: one.mean()[None, None]),
        UNTOUCHED,
        r"shape \[1, 1\]; expected \[8, 4\]",
    ),
    "blocks for one number": (None, with_scale(lambda one: one.expand(8, 4)), UNTOUCHED, "and weight_block_size is"),
    "blocks that config.json denies": (BLOCK, None, fp8_config(None), "and weight_block_size is null"),
    "one scale that config.json denies": (None, None, fp8_config(BLOCK), r"shape \[\]; expected \[4, 8\]"),
    "blocks of the default size": (None, None, {"quant_method": "fp8"}, r"shape \[\]; expected \[1, 2\]"),
    "blocks of another size": (BLOCK, None, fp8_config(64), r"shape \[4, 8\]; expected \[2, 4\]"),
    "blocks that do not divide": (BLOCK, None, fp8_config(48), "which blocks of 48 x 48 do not divide"),
    "transposed": (BLOCK, with_scale(lambda one: one.T), UNTOUCHED, r"shape \[4, 8\], which is transposed"),
    "zero": (None, with_scale(number_at(0.0)), UNTOUCHED, f"{GATE0}.{SCALE} has the scale 0; "),
    "zero in a block": (BLOCK, with_scale(number_at(0.0)), UNTOUCHED, "has the scale 0; "),
    "not a number": (BLOCK, with_scale(number_at(math.nan)), UNTOUCHED, "has the scale nan; "),
    "infinite": (None, with_scale(number_at(math.inf)), UNTOUCHED, "has the scale inf; "),
    "negative": (BLOCK, with_scale(number_at(-0.01)), UNTOUCHED, "has the scale -0.01; "),
    "the reciprocal": (None, with_scale(torch.reciprocal), UNTOUCHED, "the reciprocal of a scale"),
    "scales in integers": (BLOCK, with_scale(lambda one: one.to(torch.int32)), UNTOUCHED, "is in I32"),
    "scales in a byte that is not declared": (
        BLOCK,
        with_scale(lambda one: torch.full(one.shape, 120, dtype=torch.uint8)),
        UNTOUCHED,
        "is in U8",
    ),
    "e5m2": (
        None,
        lambda one: one.update({f"{Q0}.weight": one[f"{Q0}.weight"].float().to(torch.float8_e5m2)}),
        UNTOUCHED,
        "is in F8_E5M2",
    ),
    "a full matrix beside a scale": (
        None,
        lambda one: one.update({f"{Q0}.weight": one[f"{Q0}.weight"].bfloat16()}),
        UNTOUCHED,
        "is the scale of no matrix in FP8",
    ),
    "experts in one tensor": (
        None,
        lambda one: one.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(2, 4, 4).to(torch.float8_e4m3fn)}),
        UNTOUCHED,
        r"is FP8 of shape \[2, 4, 4\]: experts in one tensor",
    ),
    "FP8 that nothing declares": (None, None, None, "is in F8_E4M3, and config.json has no quantization_config"),
    "FP8 that is declared alone": (
        None,
        lambda one: [
            one.update({name: one[name].bfloat16()}) if name.endswith(".weight") else one.pop(name)
            for name in list(one)
            if "proj." in name
        ],
        UNTOUCHED,
        "declares fp8, and no tensor is in FP8",
    ),
    "two numbers of a block": (BLOCK, None, fp8_config(BLOCK, weight_block_size=[BLOCK]), r"block_size is \[32\]"),
    "a block of nothing": (BLOCK, None, fp8_config(BLOCK, weight_block_size=[0, 128]), r"block_size is \[0, 128\]"),
    "another form of scales": (None, None, fp8_config(None, scale_fmt="mx"), "scale_fmt is 'mx'"),
    "FP4 experts": (None, None, fp8_config(None, expert_dtype="fp4"), "expert_dtype is 'fp4'"),
    "NVFP4": (None, None, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt', quant_algo 'NVFP4'"),
    "NVFP4 in compressed-tensors": (
        None,
        None,
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "config_groups": {"group_0": {}}},
        "quant_method 'compressed-tensors', format 'nvfp4-pack-quantized'",
    ),
    "bitsandbytes": (None, None, {"quant_method": "bitsandbytes", "load_in_4bit": True}, "nf4 in the recipe loads it"),
    "GPTQ": (None, None, {"quant_method": "gptq", "bits": 4}, "quant_method 'gptq', bits 4"),
    "no method": (None, None, {"weight_block_size": None}, r"with the keys \['weight_block_size'\]"),
    "no object": (None, None, "fp8", "quantization_config 'fp8'"),
}


def mutant(folder: Path, bases: dict[int | None, Path], name: str) -> Path:
    block, change, configuration, _ = MUTANTS[name]
    found = Path(shutil.copytree(bases[block], folder))
    if change is not None:
        changed(found, change)
    if configuration is not UNTOUCHED:
        reconfigured(found, configuration)
    return found


@pytest.mark.parametrize("name", sampled(MUTANTS, [*MUTANTS][::3]))
def test_a_layout_that_is_not_known_is_refused_by_name(
    fp8_bases: dict[int | None, Path], tmp_path: Path, make_recipe: MakeRecipe, name: str
) -> None:
    folder = mutant(tmp_path / "base", fp8_bases, name)
    # the first is the function that refuses a recipe in `check` and in `train`
    for load in (lambda one: plan_run(make_recipe(one)), lambda one: load_base(BaseFolder(one), "fp32", "cpu")):
        with pytest.raises(PinError, match=MUTANTS[name][3]) as caught:
            load(folder)
        assert str(caught.value.place).startswith(str(folder))
        assert caught.value.expected
        assert caught.value.next_step


@pytest.mark.usefixtures("data_alone")
@pytest.mark.parametrize("name", [pytest.param("transposed", marks=pytest.mark.slow), "NVFP4 in compressed-tensors"])
def test_check_and_train_refuse_alike(
    fp8_bases: dict[int | None, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder = mutant(tmp_path / "base", fp8_bases, name)
    write_rows(tmp_path / "rows.jsonl")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_data(folder)))
    with pytest.raises(PinError) as caught:
        plan_run(parse_recipe(recipe_data(folder), folder=tmp_path))
    assert main(["train", str(recipe)]) == 2
    assert caught.value.found in capsys.readouterr().err
    assert main(["check", str(recipe), "--output-format", "json"]) == 1
    found = {one["found"]: one["rule"] for one in json.loads(capsys.readouterr().out)["causes"]}
    assert found[caught.value.found] == "ML641"


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="older versions do not dequantise here")
@pytest.mark.parametrize("block", [None, 64])
def test_experts_that_are_matrices_of_their_own_are_dequantised(tmp_path: Path, block: int | None) -> None:
    """Mixtral's files have a matrix for each expert: each has its scale, as those of Mistral 4, one tensor, cannot."""
    full = write_tiny_base(tmp_path / "full", cut_v3(), architecture=Architecture(TEXT_MODELS["mixtral"]))
    folder = fp8_copy(full, tmp_path / "fp8", block=block)
    ours = load_base(BaseFolder(folder), "bf16", "cpu").state_dict()
    layout = BaseFolder(folder).weights
    assert isinstance(layout, DequantizedWeights)
    experts = {name for name in layout.layout.scales if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    # each expert by itself: transformers stacks them in memory
    stacked = ours["model.layers.0.mlp.experts.down_proj"]
    stored, scales = load_file(folder / WEIGHTS), layout.layout.scales
    for place in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{place}.w2.weight"
        expected = dequantize(stored[name], stored[scales[name]], layout.layout.block).to(torch.bfloat16)
        assert torch.equal(stacked[place], expected)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []
