"""The weights of an FP8 checkpoint in full precision, one tensor at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.checkpoint.fp8 import METHOD, Fp8Layout, fp8_layout
from pytest_mistral_lora.checkpoint.weights import DTYPES, Weights

if TYPE_CHECKING:
    import numpy as np
    import torch


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
    """The tensors of an FP8 checkpoint as full ones: matrices are multiplied by their scales, and scales left out.

    Attributes:
        layout: The layout of the scales.
    """

    def __init__(self, stored: Weights, layout: Fp8Layout, dtype: str) -> None:
        """Take the place of an FP8 checkpoint's tensors.

        Args:
            stored: The tensors as the files have them.
            layout: The layout of the scales.
            dtype: The dtype that headers give for a dequantised matrix, as torch names it.
        """
        self.files, self._stored, self.layout = stored.files, stored, layout
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
        tensor = self._stored[name]
        return tensor if scale is None else dequantize(tensor, self._stored[scale], self.layout.block)

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor as numpy has it; a dequantised matrix is made by torch."""
        found: np.ndarray[Any, Any] = self[name].numpy() if name in self.layout.scales else super().array(name)
        return found

    @property
    def stored(self) -> Weights:
        """The tensors as the files have them."""
        return self._stored

    def facts(self, itemsize: int) -> dict[str, Any]:
        """Return what a manifest records of them.

        Args:
            itemsize: Bytes of a number in memory.
        """
        return {
            "method": METHOD,
            "scaling": self.layout.scaling,
            "matrices": len(self.layout.scales),
            "stored_bytes": sum(file.stat().st_size for file in self.files),
            "bytes": itemsize * sum(info.size for info in self.infos.values()),
        }


def full_weights(config: Mapping[str, Any], files: Sequence[Path]) -> Weights:
    """Return the tensors of a checkpoint in full precision; those of an FP8 one are dequantised as they are read.

    Args:
        config: Its `config.json`.
        files: Its safetensors files.

    Raises:
        PinError: As for `fp8_layout`.
        InputError: As for `Weights`.
    """
    stored = Weights(files)
    layout = fp8_layout(config, stored, str(files[0].parent / "config.json"))
    if layout is None:
        return stored
    text = config.get("text_config")
    parts = (config, text if isinstance(text, dict) else {})
    named = [part[key] for part in parts for key in ("dtype", "torch_dtype") if isinstance(part.get(key), str)]
    return DequantizedWeights(stored, layout, named[0] if named else "bfloat16")
