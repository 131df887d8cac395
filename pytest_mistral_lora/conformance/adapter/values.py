"""What the numbers of an adapter say: finite, trained, of a sound dtype, each layer's own."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.adapter.files import Opened, TensorInfo
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.errors import InputError

if TYPE_CHECKING:
    import torch

LARGEST = 1e3
"""Numbers of an adapter are small: far below 1, and a few at most where the learning rate is high."""

_TRAINED = ("F32", "BF16", "F16", "F64")
_TRAINED_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


@dataclass(frozen=True, slots=True)
class Numbers:
    """A tensor, summed up.

    Attributes:
        finite: Whether every number is.
        largest: The largest absolute value; 0.0 for a tensor of zeros.
        sha256: Hash of its bytes.
    """

    finite: bool
    largest: float
    sha256: str


def summed_up(file: Path) -> dict[str, Numbers]:
    """Sum up every tensor of a safetensors file, one at a time, so that memory does not grow with the file.

    Raises:
        InputError: If the file cannot be loaded.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return {name: _numbers(content.get_tensor(name)) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise InputError(f"safetensors cannot load it: {error}", place=str(file)) from error


def _numbers(tensor: torch.Tensor) -> Numbers:
    import torch

    digest = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return Numbers(True, float(tensor.numel() > 0), digest)
    low, high = torch.aminmax(tensor.to(torch.float32) if tensor.dtype.itemsize < 4 else tensor)
    largest = max(-low.item(), high.item())
    return Numbers(bool(torch.isfinite(low) and torch.isfinite(high)), largest, digest)


def finite_findings(opened: Opened, numbers: Mapping[str, Numbers]) -> Iterator[Finding]:
    """Yield each tensor with a NaN or an infinity, and what its numbers' size and dtype say."""
    for name, one in sorted(numbers.items()):
        if not one.finite:
            yield Finding("ML402", f"{name} is not finite", opened.place, "finite numbers")
        elif one.largest > LARGEST:
            found = f"{name} has a number of {one.largest:.3g}"
            yield Finding("ML416", found, opened.place, f"none above {LARGEST:g}")
    yield from dtype_findings(opened.tensors or {}, opened.place)


def dtype_findings(tensors: Mapping[str, TensorInfo], place: str) -> Iterator[Finding]:
    """Yield dtypes that no adapter is trained in, and more than one of them in a file."""
    for name, info in sorted(tensors.items()):
        if info.dtype not in _TRAINED:
            yield Finding("ML414", f"{name} is {info.dtype}", place, "F32, BF16 or F16")
    dtypes = sorted({info.dtype for info in tensors.values() if info.dtype in _TRAINED})
    if len(dtypes) > 1 or dtypes == ["F64"]:
        yield Finding("ML415", f"tensors of {' and '.join(dtypes)}", place, "one dtype: F32, BF16 or F16")


def trained_findings(opened: Opened, numbers: Mapping[str, Numbers]) -> Iterator[Finding]:
    """Yield each LoRA tensor that is zero, and layers that share their numbers."""
    same: dict[str, list[str]] = defaultdict(list)
    for name, one in sorted(numbers.items()):
        shape = (opened.tensors or {})[name].shape
        if 0 in shape or not any(side in name for side in _TRAINED_PARTS):
            continue
        if one.largest == 0:
            yield Finding("ML403", f"{name} is zero: this layer learned nothing", opened.place, "a trained layer")
        elif shape != (1, 1):
            same[one.sha256].append(name)
    for names in same.values():
        if len(names) > 1:
            found = f"{names[1]} is {names[0]} again" + (f", and {len(names) - 2} more are" if names[2:] else "")
            yield Finding("ML417", found, opened.place, "numbers of its own for each layer")
