"""What the numbers of an adapter say: finite, trained, of a sound dtype, each layer's own."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.checkpoint.weights import TensorInfo, read_header
from pytest_mistral_lora.conformance.adapter.files import CONFIG, TENSORS, Opened, model_files, read_object
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import inside

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


def merged_cases(folder: Path, base: Path | None) -> Mapping[str, Callable[[], Result]]:
    """Return what is checked of a merged model's folder, by name.

    Args:
        folder: The folder, with a manifest of kind `merged`.
        base: The base checkpoint, where the user named it.
    """
    return {
        "files": partial(_files, folder),
        "tensors-finite": partial(_finite, folder),
        "changes-the-base": partial(_changes, folder, base),
    }


def _files(folder: Path) -> Result:
    return Result(tuple(_file_findings(folder)), facts=(("kind", "merged"),))


def _file_findings(folder: Path) -> Iterator[Finding]:
    for name in (CONFIG, TENSORS):
        if (folder / name).exists():
            found = f"{name} in a merged model's folder: transformers would put the adapter on once more"
            yield Finding("ML418", found, str(folder / name), "full weights and no adapter")
    try:
        config = read_object(folder, "config.json")
        if config.get("quantization_config"):
            yield Finding("ML421", "the merged weights are quantised", str(folder / "config.json"), "full precision")
        _headers([inside(folder, file.name) for file in model_files(folder)])
    except InputError as error:
        yield Finding("ML405", error.found, error.place, error.expected)


def _headers(files: Sequence[Path]) -> dict[str, tuple[Path, TensorInfo]]:
    """Return every tensor of a full model with its file.

    Raises:
        InputError: If a file cannot be used.
    """
    found: dict[str, tuple[Path, TensorInfo]] = {}
    for file in files:
        found |= {name: (file, info) for name, info in read_header(file).items()}
    return found


def _finite(folder: Path) -> Result:
    try:
        numbers = {name: one for file in model_files(folder) for name, one in summed_up(file).items()}
    except InputError as error:
        return Result((Finding("ML405", error.found, error.place, "a file that safetensors loads"),))
    wrong = (name for name, one in sorted(numbers.items()) if not one.finite)
    return Result(tuple(Finding("ML402", f"{name} is not finite", str(folder), "finite numbers") for name in wrong))


def _changes(folder: Path, given: Path | None) -> Result:
    base = AdapterFolder(folder).locate_base(given)
    if base.folder is None:
        return Result(not_checked=base.missing)
    try:
        own, before = _headers(model_files(folder)), _headers(model_files(base.folder))
        return Result(tuple(_change_findings(folder, own, before)))
    except MistralLoraError as error:
        return Result(not_checked=f"base or model cannot be read: {error}")


def _change_findings(
    folder: Path, own: Mapping[str, tuple[Path, TensorInfo]], before: Mapping[str, tuple[Path, TensorInfo]]
) -> Iterator[Finding]:
    for name in sorted(own.keys() ^ before.keys()):
        where = "is not in the base" if name in own else "of the base is missing"
        yield Finding("ML412", f"{name} {where}", str(folder), "the tensors of the base")
    shared = sorted(own.keys() & before.keys())
    for name in shared:
        if own[name][1].shape != before[name][1].shape:
            found = f"{name} has shape {own[name][1].shape}"
            yield Finding("ML412", found, str(folder), f"{before[name][1].shape}, as the base's")
    if shared and all(_equal(name, own[name][0], before[name][0]) for name in shared):
        yield Finding("ML413", "every weight is the base's: nothing was merged", str(folder), "other weights")


def _equal(name: str, one: Path, other: Path) -> bool:
    import torch
    from safetensors import safe_open

    with safe_open(one, framework="pt") as first, safe_open(other, framework="pt") as second:
        return torch.equal(first.get_tensor(name).float(), second.get_tensor(name).float())
