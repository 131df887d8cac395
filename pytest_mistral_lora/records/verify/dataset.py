"""Facts about the data files and their rows, where they are at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.rows import read_rows
from pytest_mistral_lora.records.hashing import sha256_file
from pytest_mistral_lora.records.identity import sha256_files
from pytest_mistral_lora.records.verify.facts import Fact, absent, computed
from pytest_mistral_lora.records.verify.recount import recounted


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
