"""Write the merged weights: file by file as the base has them, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from pytest_mistral_lora.checkpoint.weights import Weights, write_safetensors
from pytest_mistral_lora.errors import MergeError
from pytest_mistral_lora.records.files import read_json, write_json
from pytest_mistral_lora.training.merge.plan import Change

INDEX = "model.safetensors.index.json"


def written_size(base: Weights, dtype: str) -> int:
    """Return how many bytes the merged tensors have."""
    return sum(math.prod(info.shape) for info in base.infos.values()) * int(getattr(torch, dtype).itemsize)


def write_weights(
    folder: Path, base: Weights, adapter: Weights, changes: Mapping[str, Change], dtype: str, *, progress: bool = False
) -> None:
    """Write the base's files again with the changes, and its index.

    In memory are, at any time, one tensor of the base and of the adapter what changes it, in float32.

    Args:
        folder: Where the files go, under the base's names.
        base: The base's tensors.
        adapter: The adapter's tensors.
        changes: What `plan` returned.
        dtype: dtype of all tensors in the files.
        progress: Whether to show a bar on stderr.

    Raises:
        MergeError: If a tensor is not finite in `dtype`.
    """
    with tqdm(total=len(base), unit="tensor", desc="merging", disable=not progress) as bar:

        def merged(name: str) -> torch.Tensor:
            bar.update()
            change = changes.get(name)
            tensor = base[name] if change is None else change.apply(base[name], adapter)
            return _finite(name, tensor.to(getattr(torch, dtype)), tensor)

        for file in base.files:
            shapes = {name: base.infos[name].shape for name in base.names_in(file)}
            bar.set_postfix_str(file.name)
            write_safetensors(folder / file.name, shapes, dtype, merged)
    _write_index(folder, base, dtype)


def _finite(name: str, written: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    if torch.isfinite(written).all():
        return written
    largest = exact.abs().max().item()
    raise MergeError(
        f"{name} is not finite in {written.dtype}: its largest number is {largest:g}",
        expected="finite numbers",
        next_step="Nothing is written. Check the adapter, or merge with --dtype bfloat16 or float32.",
    )


def _write_index(folder: Path, base: Weights, dtype: str) -> None:
    index = base.files[0].with_name(INDEX)
    if not index.is_file():
        return
    data = read_json(index)
    metadata = {**data.get("metadata", {}), "total_size": written_size(base, dtype)}
    write_json(folder / INDEX, {**data, "metadata": metadata})
