"""Compute again what a manifest records: match, mismatch or not available for each fact, never two states only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.checkpoint.tokenizers import oracle_file
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.records.files import inside, read_json
from pytest_mistral_lora.records.hashing import sha256_file, sha256_tensors
from pytest_mistral_lora.records.identity import base_weights_sha256, read_tensors, sha256_files
from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.verify_rows import recounted

if TYPE_CHECKING:
    import torch

State = Literal["match", "mismatch", "not available"]
_ADAPTER = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_CONFIG_KEYS = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rslora": "use_rslora",
    "dora": "use_dora",
}


@dataclass(frozen=True)
class Fact:
    """One recorded fact, computed again.

    Attributes:
        name: Its JSON path in the manifest, without `$.`.
        state: Whether it was found again.
        recorded: What the manifest says.
        found: What was computed, or why it could not be.
        place: The artifact that it was computed from; empty where there is none.
    """

    name: str
    state: State
    recorded: Any
    found: Any
    place: str = ""


def verify(folder: Path, *, base: Path | None = None, dataset: Path | Sequence[Path] | None = None) -> list[Fact]:
    """Compute again every fact of a folder's manifest that can be.

    Args:
        folder: An adapter or merged folder with `manifest.json`.
        base: The base checkpoint folder; without it, facts about the base are not available.
        dataset: The training files in recipe order, or a folder that holds them; without it, facts about the rows are
            not available.

    Raises:
        InputError: If there is no valid manifest.
    """
    data = load(folder).data
    facts = [*_files(folder, data), *_parts(folder, data), *_base(data, base)]
    if data["kind"] == "adapter":
        facts += [*_tensors(folder, data), *_config(folder, data)]
    return [*facts, *_dataset(folder, data, dataset)]


def _fact(name: str, recorded: Any, compute: Callable[[], Any], place: Path | str) -> Fact:
    try:
        found = compute()
    except (MistralLoraError, OSError, KeyError, TypeError, ValueError) as error:  # a damaged artifact, of any kind
        return Fact(name, "mismatch", recorded, f"cannot be computed: {error}", str(place))
    return Fact(name, "match" if found == recorded else "mismatch", recorded, found, str(place))


def _absent(name: str, recorded: Any, why: str) -> Fact:
    return Fact(name, "not available", recorded, why)


def _files(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    for name, entry in data.get("files", {}).items():
        yield _fact(f"files.{name}.sha256", entry["sha256"], partial(_own_sha256, folder, name), folder / name)


def _parts(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    for part in ("tokenizer", "template"):
        if part in data:
            name = data[part]["file"]
            yield _fact(f"{part}.sha256", data[part]["sha256"], partial(_own_sha256, folder, name), folder / name)


def _own_sha256(folder: Path, name: str) -> str:
    return sha256_file(inside(folder, name))


def _base(data: Mapping[str, Any], base: Path | None) -> Iterator[Fact]:
    recorded = data.get("base_weights_sha256")
    if base is None:
        yield _absent("base_weights_sha256", recorded, "no base given")
        return
    if recorded is None:
        yield _absent("base_weights_sha256", recorded, "not recorded")
    else:
        yield _fact("base_weights_sha256", recorded, lambda: base_weights_sha256(base), base)
    file = oracle_file(base)
    if file is not None and "tokenizer" in data:
        yield _fact("tokenizer.sha256", data["tokenizer"]["sha256"], lambda: sha256_file(file), file)


def _tensors(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    if "lora" not in data:
        yield _absent("lora.tensors_sha256", None, "not recorded")
        return
    file, lora = folder / _ADAPTER, data["lora"]
    yield _fact("lora.tensors_sha256", lora["tensors_sha256"], lambda: sha256_tensors(_read(folder)), file)
    yield _fact("lora.layers", lora["layers"], lambda: sum(".lora_A." in name for name in _read(folder)), file)
    yield _fact("lora.parameters", lora["parameters"], lambda: _elements(folder), file)


def _read(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(inside(folder, _ADAPTER))


def _elements(folder: Path) -> int:
    return sum(tensor.numel() for tensor in _read(folder).values())


def _config(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    file = folder / _CONFIG
    for name, key in (("base", "base_model_name_or_path"), ("revision", "revision")):
        yield _fact(name, data[name], partial(_key, file, key), file)
    if "lora" not in data:
        return
    for name, key in _CONFIG_KEYS.items():
        if name in data["lora"]:
            yield _fact(f"lora.{name}", data["lora"][name], partial(_key, file, key), file)
    for name in ("target_modules", "modules_to_save"):
        if name in data["lora"]:
            yield _fact(f"lora.{name}", data["lora"][name], partial(_names, file, name), file)


def _names(file: Path, key: str) -> list[str]:
    return sorted(_key(file, key) or [])


def _key(file: Path, key: str) -> Any:
    return read_json(inside(file.parent, file.name))[key]


def _dataset(folder: Path, data: Mapping[str, Any], dataset: Path | Sequence[Path] | None) -> Iterator[Fact]:
    if dataset is None:
        yield _absent("dataset_sha256", data["dataset_sha256"], "no dataset given")
        return
    paths = _paths(data, dataset)
    place = ", ".join(map(str, paths))
    yield _fact("dataset_sha256", data["dataset_sha256"], lambda: sha256_files(paths), place)
    if "dataset" not in data:
        return
    yield from _eval_files(data, dataset)
    for index, (path, entry) in enumerate(zip(paths, data["dataset"]["files"], strict=False)):
        yield _fact(f"dataset.files[{index}].sha256", entry["sha256"], partial(sha256_file, path), path)
    yield from _rows(folder, data, paths, place)


def _rows(folder: Path, data: Mapping[str, Any], paths: Sequence[Path], place: str) -> Iterator[Fact]:
    if "masking" not in data or "training" not in data:
        yield _absent("dataset.rows_sha256", data["dataset"]["rows_sha256"], "how rows were encoded is not recorded")
        return
    for name, found in recounted(folder, data, paths):
        part, _, key = name.partition(".")
        if key not in data[part]:
            continue  # an older manifest: it records less
        recorded = data[part][key]
        if isinstance(found, Exception):
            yield Fact(name, "mismatch", recorded, str(found), place)
        else:
            yield Fact(name, "match" if found == recorded else "mismatch", recorded, found, place)


def _eval_files(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> Iterator[Fact]:
    folder = dataset if isinstance(dataset, Path) and dataset.is_dir() else None
    for index, entry in enumerate(data["dataset"]["eval_files"]):
        name = f"dataset.eval_files[{index}].sha256"
        if folder is None:
            yield _absent(name, entry["sha256"], "no folder of data files given")
        else:
            file = folder / Path(entry["path"]).name
            yield _fact(name, entry["sha256"], partial(sha256_file, file), file)


def _paths(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> list[Path]:
    if not isinstance(dataset, Path):
        return list(dataset)
    if not dataset.is_dir() or "dataset" not in data:
        return [dataset]
    return [dataset / Path(entry["path"]).name for entry in data["dataset"]["files"]]
