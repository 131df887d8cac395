"""The gate of a folder on disk: the rows that its manifest records, and base and adapter, or base and merged model."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from pytest_mistral_lora.chat.encoded import Policy
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.sources import recorded_file
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.base_location import recipe_folder
from pytest_mistral_lora.records.gate import Gate
from pytest_mistral_lora.records.manifest import listed_files, open_data_files
from pytest_mistral_lora.records.schema import error_in_words
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.gate.measure import adapter_gate, judge, measure
from pytest_mistral_lora.training.gate.rows import GateRows
from pytest_mistral_lora.training.generate.model_spec import ModelSpec
from pytest_mistral_lora.training.recipe import Evaluation
from pytest_mistral_lora.training.rows.encoding import EncodingPlan
from pytest_mistral_lora.training.rows.loading import RowFiles, Split

_GIVE_FILES = "Give the folder of the files with --dataset."


@dataclass(frozen=True)
class FolderGate:
    """The gate of a folder, measured again.

    Attributes:
        gate: The measurements now.
        recorded: Those of its manifest; None if it records none.
        kind: `adapter` or `merged`.
        base: Folder of the base.
        rows: Number of rows by their name in the manifest, each with the recorded hash.
    """

    gate: Gate
    recorded: Gate | None
    kind: str
    base: Path
    rows: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return the gate as plain JSON data."""
        return {
            "kind": self.kind,
            "base": str(self.base),
            "rows": dict(self.rows),
            "verdict": self.gate.verdict,
            **self.gate.to_json(),
        }


def folder_gate(
    path: Path,
    base: Path | None = None,
    *,
    dataset: Path | None = None,
    device: str = "auto",
    display: RunDisplay | None = None,
) -> FolderGate:
    """Measure the gate of a folder again, from the files on disk.

    A merged model is compared with the base in the dtype of the merged weights: one of the two is in memory at a time.

    Args:
        path: The folder of an adapter or of a merged model, with its manifest.
        base: The base's folder; by default, the one that the folder records.
        dataset: The folder of the data files; by default, the recipe's folder, if the adapter is still beside it.
        device: `auto`, `cpu` or `cuda`.
        display: Display of the progress; None to show nothing.

    Raises:
        InputError: If the manifest records no rows for a gate, the rows are not the recorded ones, or folder and base
            do not go together.
    """
    display = display or RunDisplay()
    folder = AdapterFolder(path, BaseFolder(base) if base else None, may_fetch=True)
    spec = ModelSpec.of(folder, device=device)
    found = folder.located_base.require(path)
    _ = folder.base_weights_sha256  # the base of a merged model is checked here alone
    display.phase("reading the rows of the gate")
    rows, counts = recorded_rows(folder, dataset)
    how: Any = {"precision": spec.precision, "device": spec.device}
    if folder.kind == "merged":
        display.phase("loading the base")
        of_base = measure(load_base(found, spec.precision, spec.device).eval(), spec.encoder, rows, "base", display)
        # the merged model takes its place in memory
        gc.collect()
        torch.cuda.empty_cache()
        display.phase("loading the merged model")
        gate = judge(of_base, measure(spec.load(), spec.encoder, rows, "merged model", display), rows, **how)
    else:
        display.phase("loading base and adapter")
        gate = adapter_gate(spec.load(), spec.encoder, rows, display=display, **how)
    return FolderGate(gate, Gate.recorded_in(folder.require_manifest().data), folder.kind, found.path, counts)


def recorded_rows(folder: AdapterFolder, dataset: Path | None) -> tuple[GateRows, dict[str, int]]:
    """Return the rows of a folder's gate, encoded as its run encoded them, and their numbers by name.

    Args:
        folder: The folder.
        dataset: The folder of the data files; None for the recipe's.

    Raises:
        InputError: If the manifest records no rows for a gate, a file is missing, or the rows have changed.
    """
    data, place = folder.require_manifest().data, folder.manifest_file
    recorded = data.get("dataset", {})
    if "recipe" not in data or "training" not in data or not recorded:
        raise InputError("records no recipe", place=str(place), expected="the manifest of a run, from version 3 on")
    home = dataset or recipe_folder(folder.path.resolve(), str(data["recipe"].get("output", "")))
    evaluation = _evaluation(data["recipe"].get("evaluation", {}), home, place)
    policy = Policy(
        data["training"]["max_length"], recorded.get("truncation", "error"), recorded.get("unsupervised", "error")
    )
    held_out, retention = None, None
    if recorded["held_out_rows"]:
        files = _files(data, recorded["eval_files"], home)
        if recorded["held_out"]:
            files = [*_files(data, recorded["files"], home, held_out=False), *files]
        plan = EncodingPlan.of(folder.encoder, policy, recorded["held_out"])
        held_out = RowFiles(plan, folder.encoder, files).read().held_out
        _require_same(held_out, recorded.get("held_out_rows_sha256"), files)
    if "retention" in recorded:
        files = _files(data, recorded["retention"]["files"], home)
        retention = RowFiles(EncodingPlan.of(folder.encoder, policy), folder.encoder, files).read().held_out
        _require_same(retention, recorded["retention"]["rows_sha256"], files)
    if held_out is None and retention is None:
        raise InputError(
            "its run held out no rows, and has no evaluation.retention",
            place=str(place),
            expected="rows that were not trained on",
            next_step="Train with data.eval or data.held_out.",
        )
    counts = {"held-out": held_out, "retention": retention}
    rows = GateRows.of(evaluation, evaluation.format_checks(), held_out, retention)
    return rows, {name: len(split.rows) for name, split in counts.items() if split is not None}


def _evaluation(written: Any, home: Path, place: Path) -> Evaluation:
    try:
        return Evaluation.model_validate(written, context={"folder": home})
    except ValidationError as error:
        first = error.errors()[0]
        where = Place.of(place).within("recipe", "evaluation", *first["loc"])
        raise InputError(error_in_words(first, Evaluation), place=where) from error


def _files(
    data: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], home: Path, *, held_out: bool = True
) -> list[DataFile]:
    """Return the data files of some entries of a manifest, each to be read as its run read it.

    Raises:
        InputError: If a file is missing.
    """
    paths = listed_files(home, entries)
    if missing := [path for path in paths if not path.is_file()]:
        raise InputError("no such file", place=str(missing[0]), next_step=_GIVE_FILES)
    opened = open_data_files(data, paths, entries, recorded_file)
    return [replace(file, is_held_out=held_out) for file in opened]


def _require_same(split: Split, recorded: str | None, files: Sequence[DataFile]) -> None:
    found = split.figures.sha256["rows"]
    if recorded is not None and found != recorded:
        raise InputError(
            f"the rows have SHA-256 {found}",
            place=", ".join(str(file.path) for file in files),
            expected=f"{recorded}, as recorded",
            next_step=_GIVE_FILES,
        )
