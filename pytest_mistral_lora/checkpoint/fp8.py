"""FP8 checkpoints: the layout of their scales, declared and checked, and their weights in full precision.

The layout is that of transformers' fine-grained FP8: a matrix of e4m3 numbers, and beside it
`weight_scale_inv`, either one number for the matrix or one for each block of `weight_block_size`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.model_facts import FP8, ModelFacts
from pytest_mistral_lora.checkpoint.weights import DTYPES, TensorInfo, Weights
from pytest_mistral_lora.errors import PinError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    import numpy as np
    import torch

DEFAULT_BLOCK = (128, 128)
"""transformers' `weight_block_size` if the key is missing; null is one scale for each matrix."""

_SCALE, _ACTIVATION = "weight_scale_inv", "activation_scale"
_SCALE_DTYPES = {"float": ("F32", "BF16", "F16"), "ue8m0": ("F8_E8M0", "F32")}
_LARGEST_WEIGHT = 1e4
"""Far above any weight of a language model, and far below weights multiplied by the reciprocal of a usual scale."""

_E4M3_MAX = 448.0
_EXPECTED = (
    f"full weights, or FP8 as transformers writes it: quant_method {FP8}, matrices in e4m3, and weight_scale_inv "
    "beside each, one number or one for each block of weight_block_size"
)
_OTHER_COPY = "Use a copy of the checkpoint in bf16, or dequantise it with the tool that quantised it."
_PACKED = frozenset({"U8", "I8", "F4", "F6_E2M3", "F6_E3M2"})


@dataclass(frozen=True)
class Fp8Layout:
    """The FP8 matrices of a checkpoint, and their scales.

    Attributes:
        block: Rows and columns of the block that a scale is for; None if a scale is for a whole matrix.
        scales: The name of each matrix's scale, by the name of the matrix.
        dropped: The tensors that a model in full precision does not have: scales of weights and of activations.
    """

    block: tuple[int, int] | None
    scales: Mapping[str, str]
    dropped: frozenset[str]


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration without its `quantization_config`, at every level."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    text = plain.get("text_config")
    return {**plain, "text_config": without_quantization(text)} if isinstance(text, dict) else plain


def quantization_facts(config: Mapping[str, Any], place: Place) -> dict[str, Any] | None:
    """Return the declared values that decide the numbers of an FP8 checkpoint; None if its weights are full ones.

    Args:
        config: Its `config.json`.
        place: The path of that file.

    Raises:
        PinError: If the weights are quantised in another way, or a value does not fit the layout.
    """
    facts = ModelFacts(config)
    declared = facts.quantization
    if declared is None:
        return None
    if facts.is_packed:
        keys = ("quant_method", "quant_algo", "format", "quant_type", "bits")
        given = declared if isinstance(declared, dict) else {"quantization_config": declared}
        shown = {key: value for key, value in given.items() if key in keys or not isinstance(declared, dict)}
        # without a name, show its keys
        text = (
            ", ".join(f"{key} {_short(value)}" for key, value in shown.items()) or f"with the keys {_short([*given])}"
        )
        step = _OTHER_COPY
        if given.get("quant_method") == "bitsandbytes":
            step = "Use the full base; base.quantization: nf4 in the recipe loads it in 4 bits."
        raise PinError(f"the base is quantised: {text}", place=place, expected=_EXPECTED, next_step=step)
    block, form = declared.get("weight_block_size", DEFAULT_BLOCK), declared.get("scale_fmt", "float")
    sides = block if isinstance(block, list | tuple) else ()
    if block is not None and (len(sides) != 2 or any(type(side) is not int or side < 1 for side in sides)):
        raise _refused(f"weight_block_size is {_short(block)}", place, "null, or two sizes of at least 1")
    for key, known in (("scale_fmt", tuple(_SCALE_DTYPES)), ("fmt", ("e4m3",)), ("expert_dtype", (FP8,))):
        if declared.get(key, known[0]) not in known:
            raise _refused(f"{key} is {_short(declared[key])}", place, " or ".join(known))
    return {"quant_method": FP8, "weight_block_size": None if block is None else list(block), "scale_fmt": form}


def fp8_layout(config: Mapping[str, Any], weights: Weights, place: Place) -> Fp8Layout | None:
    """Return the layout of a checkpoint's FP8 weights, all of it checked; None if its weights are full ones.

    Only the scales are read, not the weights.

    Args:
        config: Its `config.json`.
        weights: Its tensors.
        place: The path of its `config.json`.

    Raises:
        PinError: If a scale is missing, does not fit its matrix, or is not a positive finite number; if the
            configuration contradicts the files; if the weights are quantised in any other way.
    """
    facts, infos = quantization_facts(config, place), weights.infos
    scales = {name for name in infos if name.endswith("_scale_inv")}
    matrices = [
        name
        for name, info in infos.items()
        if (info.dtype.startswith("F8_") and name not in scales) or info.dtype in _PACKED
    ]
    if facts is None:
        if matrices:
            found = f"{matrices[0]} is in {infos[matrices[0]].dtype}, and config.json has no quantization_config"
            full = f"full weights: {', '.join(DTYPES)}"
            raise PinError(found, place=str(infos[matrices[0]].file), expected=full, next_step=_OTHER_COPY)
        return None
    block = None if facts["weight_block_size"] is None else (*facts["weight_block_size"],)
    pairs = {name: name.removesuffix("weight") + _SCALE for name in matrices}
    for name, scale in pairs.items():
        _check_pair(name, scale, infos, block, _SCALE_DTYPES[facts["scale_fmt"]])
    if alone := sorted(scales - set(pairs.values())):
        found = f"{alone[0]} is the scale of no matrix in FP8"
        raise _refused(found, infos[alone[0]], "a matrix in F8_E4M3 beside each scale")
    if not pairs:
        raise PinError(
            f"quantization_config declares {FP8}, and no tensor is in FP8",
            place=place,
            expected="matrices in F8_E4M3, each with its scale",
            next_step="If the weights are full ones, remove quantization_config from config.json.",
        )
    _check_values(weights, pairs)
    activations = (name.removesuffix("weight") + _ACTIVATION for name in matrices)
    return Fp8Layout(block, pairs, frozenset({*pairs.values(), *(name for name in activations if name in infos)}))


def _check_pair(
    name: str, scale: str, infos: Mapping[str, TensorInfo], block: tuple[int, int] | None, dtypes: Sequence[str]
) -> None:
    info = infos[name]
    if info.dtype != "F8_E4M3":
        raise _refused(f"{name} is in {info.dtype}", info, "F8_E4M3, or a full weight")
    if len(info.shape) != 2 or not info.size or not name.endswith(".weight"):
        experts = ": experts in one tensor" if "expert" in name else ""
        found = f"{name} is FP8 of shape {list(info.shape)}{experts}"
        raise _refused(found, info, "FP8 in matrices alone, each named weight")
    if scale not in infos:
        beside = [other for other in infos if other.startswith(name.removesuffix("weight")) and other != name]
        others = f"; beside it are {', '.join(beside[:3])}" if beside else ""
        raise _refused(f"{name} is in FP8, and its scale is missing{others}", info, scale)
    factor, shape = infos[scale], list(infos[scale].shape)
    if factor.dtype not in dtypes:
        raise _refused(f"{scale} is in {factor.dtype}", factor, " or ".join(dtypes))
    if block is None:
        # in memory the scale has no dimensions; transformers saves it as a list or a matrix of one number
        if shape not in ([], [1], [1, 1]):
            raise _refused(f"{scale} has shape {shape}, and weight_block_size is null", factor, "one number")
        return
    rows, columns = info.shape
    if rows % block[0] or columns % block[1]:
        found = f"{name} has shape {[rows, columns]}, which blocks of {block[0]} x {block[1]} do not divide"
        raise _refused(found, info, "a matrix of whole blocks, or a full one")
    grid = [rows // block[0], columns // block[1]]
    if shape != grid:
        turned = ", which is transposed" if shape == grid[::-1] else ""
        expected = f"{grid}: one number for each block of {block[0]} x {block[1]} in {rows} x {columns}"
        raise _refused(f"{scale} has shape {shape}{turned}", factor, expected)


def _check_values(weights: Weights, scales: Mapping[str, str]) -> None:
    for matrix, name in scales.items():
        values = weights[name].float().reshape(-1)
        least, most = values.min().item(), values.max().item()
        # a NaN makes both results NaN
        if math.isfinite(least) and least > 0 and most * _E4M3_MAX <= _LARGEST_WEIGHT:
            continue
        wrong = least if not least > 0 else most
        found = f"{name} has the scale {wrong:g}"
        if wrong > 0 and math.isfinite(wrong):
            found += f", with which {matrix} has weights up to {wrong * _E4M3_MAX:g}: the reciprocal of a scale?"
        raise _refused(found, weights.infos[name], "positive finite numbers, by which a weight is multiplied")


def _refused(found: str, at: TensorInfo | Place, expected: str) -> PinError:
    found, place = f"FP8 in a layout that is not known: {found}", at if isinstance(at, Place) else Place.of(at.file)
    return PinError(found, place=place, expected=expected, next_step=_OTHER_COPY)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def dequantize(matrix: torch.Tensor, scale: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """Return a matrix in full precision, float32: each number times its scale.

    Args:
        matrix: The matrix in e4m3, `(rows, columns)`.
        scale: One number, or one for each block, `(rows / block rows, columns / block columns)`.
        block: Rows and columns of a block; None if the scale is one number.

    Raises:
        ValueError: If the scale does not have the shape that the block asks for.
    """
    # W = q · s, in float32: e4m3 has 4 significant bits, and the product is rounded once
    full, factor = matrix.float(), scale.float()
    if block is None:
        return full.mul_(factor.reshape(()))
    rows, columns = factor.shape
    if (rows * block[0], columns * block[1]) != tuple(full.shape):
        raise ValueError(f"scales of shape {tuple(factor.shape)} for {tuple(full.shape)} in blocks of {block}")
    parts = full.view(rows, block[0], columns, block[1])
    return parts.mul_(factor[:, None, :, None]).view_as(full)


class DequantizedWeights(Weights):
    """The tensors of an FP8 checkpoint in full precision: matrices are multiplied by their scales, which are left out.

    Attributes:
        layout: The layout of the scales.
        stored: The tensors as the files have them.
    """

    def __init__(self, stored: Weights, layout: Fp8Layout, dtype: str) -> None:
        """Wrap an FP8 checkpoint's tensors.

        Args:
            stored: The tensors as the files have them.
            layout: The layout of the scales.
            dtype: The dtype that headers give for a dequantised matrix, as torch names it.
        """
        super().__init__(())
        self.files = stored.files
        self.stored: Weights = stored
        self.layout: Fp8Layout = layout
        code = DTYPES.get(dtype, "BF16")
        self.infos = {
            name: replace(info, dtype=code) if name in layout.scales else info
            for name, info in stored.infos.items()
            if name not in layout.dropped
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU: a dequantised matrix in float32, any other in its own dtype."""
        if name not in self.infos:
            raise KeyError(name)
        scale = self.layout.scales.get(name)
        tensor = self.stored[name]
        return tensor if scale is None else dequantize(tensor, self.stored[scale], self.layout.block)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor as a numpy array; torch dequantises a matrix."""
        found: np.ndarray[Any, Any] = self[name].numpy() if name in self.layout.scales else super().array(name)
        return found

    def facts(self, itemsize: int) -> dict[str, Any]:
        """Return the facts that a manifest records about them.

        Args:
            itemsize: Bytes of a number in memory.
        """
        block = self.layout.block
        return {
            "method": FP8,
            "scaling": "one scale a matrix" if block is None else f"blocks of {block[0]} x {block[1]}",
            "matrices": len(self.layout.scales),
            "stored_bytes": sum(file.stat().st_size for file in self.files),
            "bytes": itemsize * sum(info.size for info in self.infos.values()),
        }
