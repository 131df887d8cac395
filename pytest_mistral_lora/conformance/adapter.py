"""Is an adapter folder a trained LoRA adapter that fits its configuration, and its base?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.targets import AdapterTarget
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import read_json

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])\.weight")


def checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an adapter folder."""
    yield Check(target, "adapter", "tensors", lambda: Result(tuple(adapter_findings(target.folder, target.base))))


def adapter_findings(folder: Path, base: Path | None = None) -> Iterator[Finding]:
    """Yield what is wrong with an adapter's tensors.

    Args:
        folder: The folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: The base checkpoint, or None: then the layers are taken from the tensors' own names.

    Raises:
        InputError: If a file is missing or cannot be read.
    """
    config = read_json(folder / CONFIG)
    tensors = _tensors(folder / TENSORS)
    place = str(folder / TENSORS)
    yield from _names(tensors, config, base, place)
    yield from _values(tensors, config, place)


def _tensors(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise InputError("no such file", place=str(file), expected="the adapter as safetensors, not pickle")
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise InputError(f"not a safetensors file: {error}", place=str(file)) from error


def _names(tensors: Mapping[str, Any], config: Mapping[str, Any], base: Path | None, place: str) -> Iterator[Finding]:
    if not tensors:
        yield Finding("ML401", "the file holds no tensors", place, "two for each adapted layer")
        return
    targets = set(config.get("target_modules") or ())
    layers = _layers(base, targets) if base is not None else _layers_of(tensors, targets)
    expected = {f"base_model.model.{layer}.lora_{side}.weight" for layer in layers for side in "AB"}
    for name in sorted(expected - set(tensors)):
        yield Finding("ML401", f"{name} is missing", place, f"two tensors for each of {len(layers)} layers")
    for name in sorted(set(tensors) - expected):
        yield Finding("ML401", f"{name} fits no adapted layer of the base", place, "LoRA tensors of the target modules")


def _layers(base: Path, targets: set[str]) -> list[str]:
    from pytest_mistral_lora.checkpoint.base import linear_layers

    return [layer for layer in linear_layers(base) if layer.rsplit(".", 1)[-1] in targets]


def _layers_of(tensors: Mapping[str, Any], targets: set[str]) -> list[str]:
    """Complete the layers that the names speak of: every block has every target module."""
    found = [match["layer"] for match in map(_NAME.fullmatch, tensors) if match]
    blocks = {layer.rsplit(".", 1)[0] for layer in found if layer.rsplit(".", 1)[-1] in targets}
    return [f"{block}.{target}" for block in sorted(blocks) for target in sorted(targets)]


def _values(tensors: Mapping[str, Any], config: Mapping[str, Any], place: str) -> Iterator[Finding]:
    import torch

    rank = config.get("r")
    for name, tensor in sorted(tensors.items()):
        match = _NAME.fullmatch(name)
        if not torch.isfinite(tensor).all():
            yield Finding("ML402", f"{name} is not finite", place, "finite numbers")
        elif match and match["side"] == "B" and not tensor.any():
            yield Finding("ML403", f"{name} is zero: this layer learned nothing", place, "a trained layer")
        if match and tensor.shape[0 if match["side"] == "A" else 1] != rank:
            yield Finding("ML404", f"{name} has shape {tuple(tensor.shape)}", place, f"rank {rank}, as {CONFIG} says")
