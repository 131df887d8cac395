"""The data files of a run: found again by its manifest, opened as they were read, and described in its notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading.chunks import DataFile

Opener = Callable[[Path, Mapping[str, Any]], DataFile]
"""Opens a file by its entry in the manifest's `dataset`: `data.sources.recorded_file`."""


def training_files(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> list[Path]:
    """Return the training files in recipe order, of those that were given or of the folder that was given."""
    if not isinstance(dataset, Path):
        return list(dataset)
    if not dataset.is_dir() or "dataset" not in data:
        return [dataset]
    return _listed_files(dataset, data["dataset"]["files"])


def held_files(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> list[Path] | None:
    """Return the files that were held out, of the folder that was given; None if no folder was given."""
    entries = data["dataset"]["eval_files"]
    if not entries:
        return []
    return _listed_files(dataset, entries) if isinstance(dataset, Path) and dataset.is_dir() else None


def _listed_files(folder: Path, entries: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Return the files of a folder: by the paths below the recipe's own folder, or all of them in one place."""
    paths = (Path(entry["path"]) for entry in entries)
    return [folder / path if (folder / path).is_file() else folder / path.name for path in paths]


def opened(paths: Sequence[Path], entries: Sequence[Mapping[str, Any]], open_file: Opener | None) -> list[DataFile]:
    """Return files for reading, each as its entry records it; a file without an entry holds rows."""
    files = []
    for index, path in enumerate(paths):
        entry = entries[index] if index < len(entries) else {}
        files.append(DataFile(path) if open_file is None else open_file(path, entry))
    return files


def data_notes(dataset: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the lines of DECISION.md about the data: name and value.

    Args:
        dataset: The manifest's `dataset`.
    """
    for one in dataset["files"]:
        yield f"Data file `{one['path']}`", f"{one['rows']} rows, `{one['sha256']}`{_conversion(one)}"
    for one in dataset["eval_files"]:
        yield f"Held-out file `{one['path']}`", f"`{one['sha256']}`{_conversion(one)}"
    yield "Rows", f"{dataset.get('rows_used', dataset['rows'])} trained on, {dataset['held_out_rows']} held out"
    yield from _removed("Rows to train on", dataset)
    yield from _removed("Held-out rows", dataset.get("held_out_removed", {}))


def _conversion(entry: Mapping[str, Any]) -> str:
    """Return the format of a data file that was converted to rows, with its losses; empty for a file of rows."""
    source = entry.get("source")
    if source is None:
        return ""
    lost = [f"{kind} in {number} records" for kind, number in source["losses"].items()]
    lost += [f"{source['left_out']} records"] if source["left_out"] else []
    left_out = f"; left out: {', '.join(lost)}" if lost else ""
    return f", {source['container']} of {source['format']}, rows `{source['rows_sha256']}`{left_out}"


def _removed(name: str, part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line for the rows that truncation and filtering dropped or cut, if there are any."""
    changes = [f"{number} dropped ({reason})" for reason, number in part.get("rows_dropped", {}).items()]
    changes += [f"{part['rows_truncated']} cut"] if part.get("rows_truncated") else []
    changes += [f"{part['rows_without_loss']} without loss"] if part.get("rows_without_loss") else []
    if changes:
        removed = f"{part['tokens_removed']} tokens removed, {part['supervised_tokens_removed']} of them with loss"
        yield name, f"{', '.join(changes)}: {removed}"
