"""A merged model's folder: full weights that are the base's and an adapter's, and are another than the base's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from pytest_mistral_lora.conformance.adapter.base import find_base
from pytest_mistral_lora.conformance.adapter.files import (
    CONFIG,
    TENSORS,
    TensorInfo,
    model_files,
    read_header,
    read_object,
)
from pytest_mistral_lora.conformance.adapter.values import summed_up
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.files import inside


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
    base = find_base(given, folder)
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
