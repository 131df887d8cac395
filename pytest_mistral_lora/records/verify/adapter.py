"""Facts about an adapter's tensors and its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.records.files import inside, read_json
from pytest_mistral_lora.records.hashing import sha256_tensors
from pytest_mistral_lora.records.identity import ADAPTER_TENSORS, read_tensors
from pytest_mistral_lora.records.verify.facts import Fact, absent, computed

if TYPE_CHECKING:
    import torch

_CONFIG = "adapter_config.json"
_CONFIG_KEYS = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "dora": "use_dora",
}


def adapter_facts(folder: Path, data: Mapping[str, Any]) -> list[Fact]:
    """Return what the manifest says of `adapter_model.safetensors` and `adapter_config.json`."""
    return [*_tensors(folder, data), *_config(folder, data)]


def _tensors(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    if "lora" not in data:
        yield absent("lora.tensors_sha256", None, "not recorded")
        return
    file, lora = folder / ADAPTER_TENSORS, data["lora"]
    yield computed("lora.tensors_sha256", lora["tensors_sha256"], lambda: sha256_tensors(_read(folder)), file)
    yield computed("lora.layers", lora["layers"], lambda: sum(".lora_A." in name for name in _read(folder)), file)
    yield computed("lora.parameters", lora["parameters"], lambda: _elements(folder), file)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(inside(folder, ADAPTER_TENSORS))


def _elements(folder: Path) -> int:
    return sum(tensor.numel() for tensor in _read(folder).values())


def _config(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    file = folder / _CONFIG
    for name, key in (("base", "base_model_name_or_path"), ("revision", "revision")):
        yield computed(name, data[name], partial(_key, file, key), file)
    if "lora" not in data:
        return
    for name, key in _CONFIG_KEYS.items():
        if name in data["lora"]:
            yield computed(f"lora.{name}", data["lora"][name], partial(_key, file, key), file)
    for name in ("target_modules", "modules_to_save"):
        if name in data["lora"]:
            yield computed(f"lora.{name}", data["lora"][name], partial(_names, file, name), file)


def _names(file: Path, key: str) -> list[str]:
    return sorted(_key(file, key) or [])


def _key(file: Path, key: str) -> Any:
    return read_json(inside(file.parent, file.name))[key]
