"""FP8 copies of tiny checkpoints, quantised by transformers' own operation, and damaged ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"
SCALE = "weight_scale_inv"
Q0, K0 = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
GATE0 = "model.layers.0.mlp.gate_proj"
"""256 rows and 128 columns: its grid of blocks is not square."""
BLOCK = 32


def is_quantised(name: str, tensor: torch.Tensor) -> bool:
    """Report whether FP8 checkpoints have such a tensor in FP8: the matrices of the text layers, and of experts."""
    matrix = name.endswith("proj.weight") or ".experts." in name
    return tensor.ndim == 2 and ".layers." in name and matrix and "vision" not in name


def fp8_config(block: int | None, **more: Any) -> dict[str, Any]:
    """Return the `quantization_config` of a static checkpoint with one scale a matrix, or with blocks."""
    return {
        "quant_method": "fp8",
        "activation_scheme": "static" if block is None else "dynamic",
        "weight_block_size": None if block is None else [block, block],
        "modules_to_not_convert": ["lm_head"],
        **more,
    }


def quantise(weight: torch.Tensor, block: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return e4m3 numbers and scales: the largest number of a block, or of the matrix, becomes 448."""
    side = (block, block) if block else tuple(weight.shape)
    rows, columns = weight.shape
    grid = weight.float().view(rows // side[0], side[0], columns // side[1], side[1])
    scale = grid.abs().amax(dim=(1, 3)) / 448
    numbers = (grid / scale[:, None, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return numbers.reshape(weight.shape), scale if block else scale.reshape(())


def fp8_copy(base: Path, folder: Path, *, block: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Copy a checkpoint with its layers' matrices in FP8, and all else in `dtype`."""
    shutil.copytree(base, folder)
    tensors = {}
    for name, tensor in load_file(base / WEIGHTS).items():
        if is_quantised(name, tensor):
            tensors[name], tensors[name.removesuffix("weight") + SCALE] = quantise(tensor, block)
            if block is None:
                tensors[name.removesuffix("weight") + "activation_scale"] = torch.tensor(0.02)
        else:
            tensors[name] = tensor.to(dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in ("dtype", "torch_dtype")}
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps({**kept, "dtype": name, "quantization_config": fp8_config(block)}))
    return folder


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file({name: one.contiguous() for name, one in tensors.items()}, folder / WEIGHTS, metadata={"format": "pt"})


def reconfigured(folder: Path, value: Any) -> None:
    """Give a checkpoint another `quantization_config`; None removes it."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    more = {} if value is None else {"quantization_config": value}
    (folder / "config.json").write_text(json.dumps({**config, **more}))


def by_formula(folder: Path, block: int | None) -> dict[str, torch.Tensor]:
    """Return every tensor of a model: each number of a matrix times the scale at its place, one place at a time."""
    stored = load_file(folder / WEIGHTS)
    full = {}
    for name, tensor in stored.items():
        scale = stored.get(name.removesuffix("weight") + SCALE)
        if name.endswith(".weight") and scale is not None:
            spread = scale if block is None else torch.kron(scale, torch.ones(block, block))
            full[name] = tensor.to(torch.float32) * spread
        elif not name.endswith((SCALE, "activation_scale")):
            full[name] = tensor
    return full
