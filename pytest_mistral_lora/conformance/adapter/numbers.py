"""The numbers of an adapter: finite, trained, of a sound dtype, each layer's own."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError, and_more
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

LARGEST = 1e3
"""Numbers of an adapter are small: far below 1, and a few at most with a high learning rate."""

_TRAINED = ("F32", "BF16", "F16", "F64")
_TRAINED_PARTS = (".lora_A.", ".lora_B.", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")


@dataclass(frozen=True, slots=True)
class TensorSummary:
    """A tensor in three values.

    Attributes:
        finite: Whether every number is.
        largest: The largest absolute value; 0.0 for a tensor of zeros.
        sha256: Hash of its bytes.
    """

    finite: bool
    largest: float
    sha256: str


def summarize_tensors(file: Path) -> dict[str, TensorSummary]:
    """Summarize every tensor of a safetensors file, one at a time, so that memory does not grow with the file.

    Raises:
        InputError: If the file cannot be loaded.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    found = {}
    try:
        with safe_open(file, framework="pt") as content:
            for name in content.keys():  # noqa: SIM118
                tensor = content.get_tensor(name)
                digest = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
                if not tensor.is_floating_point() or tensor.numel() == 0:
                    found[name] = TensorSummary(True, float(tensor.numel() > 0), digest)
                    continue
                # torch has no aminmax of 8-bit floats; a NaN among the numbers makes both ends NaN
                low, high = torch.aminmax(tensor.to(torch.float32) if tensor.dtype.itemsize < 4 else tensor)
                finite = bool(torch.isfinite(low) and torch.isfinite(high))
                found[name] = TensorSummary(finite, max(-low.item(), high.item()), digest)
    except (SafetensorError, OSError, RuntimeError, TypeError) as error:
        raise InputError(f"safetensors cannot load it: {error}", place=str(file)) from error
    return found


def finite_findings(folder: AdapterFolder, summaries: Mapping[str, TensorSummary]) -> Iterator[Finding]:
    """Yield tensors with a NaN, an infinity or a number that is too large, and dtypes that no adapter is trained in."""
    place = str(folder.tensors_file)
    for name, one in sorted(summaries.items()):
        if not one.finite:
            yield Finding("ML402", f"{name} is not finite", place, "finite numbers")
        elif one.largest > LARGEST:
            found = f"{name} has a number of {one.largest:.3g}"
            yield Finding("ML416", found, place, f"none above {LARGEST:g}")
    for name, info in sorted(folder.tensors.items()):
        if info.dtype not in _TRAINED:
            yield Finding("ML414", f"{name} is {info.dtype}", place, "F32, BF16 or F16")
    dtypes = sorted({info.dtype for info in folder.tensors.values() if info.dtype in _TRAINED})
    if len(dtypes) > 1 or dtypes == ["F64"]:
        yield Finding("ML415", f"tensors of {' and '.join(dtypes)}", place, "one dtype: F32, BF16 or F16")


def trained_findings(folder: AdapterFolder, summaries: Mapping[str, TensorSummary]) -> Iterator[Finding]:
    """Yield each LoRA tensor that is zero, and layers that share their numbers."""
    place = str(folder.tensors_file)
    same: dict[str, list[str]] = defaultdict(list)
    for name, one in sorted(summaries.items()):
        shape = folder.tensors[name].shape
        if 0 in shape or not any(side in name for side in _TRAINED_PARTS):
            continue
        if one.largest == 0:
            yield Finding("ML403", f"{name} is zero: this layer learned nothing", place, "a trained layer")
        elif shape != (1, 1):
            same[one.sha256].append(name)
    for names in same.values():
        if len(names) > 1:
            found = f"{names[1]} is {names[0]} again{and_more(2, len(names))}"
            yield Finding("ML417", found, place, "numbers of its own for each layer")
