"""Facts about an adapter's tensors and its configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.chat.rows import read_rows
from pytest_mistral_lora.checkpoint.tokenizers import oracle_file
from pytest_mistral_lora.records.adapter_folder import is_merged
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.hashing import (
    ADAPTER_TENSORS,
    base_weights_sha256,
    read_tensors,
    sha256_file,
    sha256_files,
    sha256_tensors,
)
from pytest_mistral_lora.records.manifest import MANIFEST
from pytest_mistral_lora.records.verify.recompute import Fact, absent, computed, recounted

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


def base_facts(data: Mapping[str, Any], base: Path | None, missing: str) -> Iterator[Fact]:
    """Yield what the manifest says of the base checkpoint.

    Args:
        data: The manifest.
        base: The base's folder; None if there is none.
        missing: Why there is none.
    """
    recorded = data.get("base_weights_sha256")
    if base is None:
        yield absent("base_weights_sha256", recorded, missing)
        return
    if recorded is None:
        yield absent("base_weights_sha256", recorded, "not recorded")
    else:
        yield computed("base_weights_sha256", recorded, lambda: _weights(base, recorded), base)
    file = oracle_file(base)
    if file is not None and "tokenizer" in data:
        yield computed("tokenizer.sha256", data["tokenizer"]["sha256"], lambda: sha256_file(file), file)


def _weights(base: Path, recorded: str) -> str:
    found = base_weights_sha256(base)
    return f"{found}, of a merged model" if found != recorded and is_merged(base) else found


def parent_facts(data: Mapping[str, Any], parent: Path | None) -> Iterator[Fact]:
    """Yield what a merged model's manifest says of its adapter."""
    for key, compute in _COMPUTED.items() if "parent" in data else ():
        name, recorded = f"parent.{key}", data["parent"][key]
        if parent is None:
            yield absent(name, recorded, "no parent given")
        else:
            yield computed(name, recorded, partial(compute, parent), parent)


def _manifest_sha256(adapter: Path) -> str:
    return sha256_file(inside(adapter, MANIFEST))


def _tensors_sha256(adapter: Path) -> str:
    return sha256_tensors(read_tensors(inside(adapter, ADAPTER_TENSORS)))


_COMPUTED = {"manifest_sha256": _manifest_sha256, "tensors_sha256": _tensors_sha256}


def dataset_facts(folder: Path, data: Mapping[str, Any], dataset: Path | Sequence[Path] | None) -> Iterator[Fact]:
    """Yield what the manifest says of the data.

    Args:
        folder: The folder of the manifest, with tokenizer and template.
        data: The manifest.
        dataset: The training files in recipe order, or a folder with them and with the held-out files; None for none.
    """
    if dataset is None:
        yield absent("dataset_sha256", data["dataset_sha256"], "no dataset given")
        return
    train = training_files(data, dataset)
    place = ", ".join(map(str, train))
    yield computed("dataset_sha256", data["dataset_sha256"], lambda: sha256_files(train), place)
    if "dataset" not in data:
        return
    held = held_files(data, dataset)
    yield from _files("dataset.files", data["dataset"]["files"], train)
    yield from _files("dataset.eval_files", data["dataset"]["eval_files"], held)
    yield from _rows(folder, data, train, held, place)


def _files(name: str, entries: Sequence[Mapping[str, Any]], paths: Sequence[Path] | None) -> Iterator[Fact]:
    for index, entry in enumerate(entries):
        if paths is None:
            yield absent(f"{name}[{index}].sha256", entry["sha256"], "no folder of data files given")
        elif index < len(paths):
            path = paths[index]
            yield computed(f"{name}[{index}].sha256", entry["sha256"], partial(sha256_file, path), path)
            yield computed(f"{name}[{index}].rows", entry["rows"], partial(_count, path), path)


def _count(path: Path) -> int:
    return sum(1 for _ in read_rows(path))


def _rows(
    folder: Path, data: Mapping[str, Any], train: Sequence[Path], held: Sequence[Path] | None, place: str
) -> Iterator[Fact]:
    if "masking" not in data or "training" not in data:
        yield absent("dataset.rows_sha256", data["dataset"]["rows_sha256"], "how rows were encoded is not recorded")
        return
    for name, found in recounted(folder, data, train, held):
        part, *keys = name.split(".")
        recorded = data[part]
        for key in keys:
            recorded = recorded.get(key) if isinstance(recorded, Mapping) else None
        if recorded is None:
            continue  # an older manifest: it records less
        if isinstance(found, Exception):
            yield Fact(name, "mismatch", recorded, str(found), place)
        else:
            yield Fact(name, "match" if found == recorded else "mismatch", recorded, found, place)


def training_files(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> list[Path]:
    """Return the training files in recipe order, of those that were given or of the folder that was given."""
    if not isinstance(dataset, Path):
        return list(dataset)
    if not dataset.is_dir() or "dataset" not in data:
        return [dataset]
    return _listed(dataset, data["dataset"]["files"])


def held_files(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> list[Path] | None:
    """Return the files that were held out, of the folder that was given; None where none was given."""
    entries = data["dataset"]["eval_files"]
    if not entries:
        return []
    return _listed(dataset, entries) if isinstance(dataset, Path) and dataset.is_dir() else None


def _listed(folder: Path, entries: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Return the files of a folder: where the recipe had them below its own, or all in one place."""
    paths = (Path(entry["path"]) for entry in entries)
    return [folder / path if (folder / path).is_file() else folder / path.name for path in paths]
