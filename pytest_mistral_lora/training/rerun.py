"""Train again from a manifest alone, and compare the adapter with the recorded one."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.hashes import sha256_files
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.sources import recorded_file
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.base_location import recipe_folder
from pytest_mistral_lora.records.manifest import held_files, open_data_files, training_files
from pytest_mistral_lora.records.tensors import sha256_tensors
from pytest_mistral_lora.records.verify import FieldCheck, State
from pytest_mistral_lora.training.display import RunDisplay
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run import train
from pytest_mistral_lora.training.run_metadata import environment

TOLERANCES = {"fp32": 0.1, "bf16": 0.5, "fp16": 0.5}
"""Largest distance on another machine or with other libraries, by precision; see `Rerun.distance`.

PyTorch and MKL with other vector instructions gave 0 to 0.06 in fp32 and 0.01 to 0.33 in bf16, most in runs that
continued after the loss reached 0, where Adam follows rounding; another seed gives 1 and more.
"""


@dataclass(frozen=True)
class Rerun:
    """The result of training again.

    Attributes:
        recorded_sha256: Hash of the adapter's tensors, as recorded.
        sha256: Hash of the new tensors.
        distance: Norm of the difference of both, over all tensors, divided by the norm of the difference of the
            recorded adapter from its initial values.
        tolerance: Largest distance that is a match; 0 if the tensors must be equal bit for bit.
        elsewhere: The differences from the recorded machine, libraries and settings that can change roundings.
    """

    recorded_sha256: str
    sha256: str
    distance: float
    tolerance: float
    elsewhere: tuple[str, ...]

    @property
    def fact(self) -> FieldCheck:
        """The verdict as a fact beside those of `verify`."""
        if self.sha256 == self.recorded_sha256:
            return FieldCheck("rerun", "match", self.recorded_sha256, "equal bit for bit")
        found = f"{self.sha256}, {self.distance:.2%} of the way apart"
        if not self.elsewhere:
            return FieldCheck("rerun", "mismatch", self.recorded_sha256, f"{found}; equal was expected on this machine")
        allowed = f"{self.tolerance:.0%} are allowed, with another {', another '.join(self.elsewhere)}"
        state: State = "match" if self.distance <= self.tolerance else "mismatch"
        return FieldCheck("rerun", state, self.recorded_sha256, f"{found}; {allowed}")


def rerun(
    adapter: Path | AdapterFolder,
    *,
    base: Path | None = None,
    dataset: Path | Sequence[Path] | None = None,
    display: RunDisplay | None = None,
) -> Rerun:
    """Train an adapter again from its manifest, in a temporary folder.

    Nothing is generated or logged. On a CPU, with as many threads, the same libraries and the same machine, the tensors
    must be equal bit for bit; elsewhere they may be `TOLERANCES` apart.

    Args:
        adapter: The adapter's folder.
        base: The base's folder; by default, the one that the folder names. An `AdapterFolder` brings its own.
        dataset: The training files in recipe order, or a folder with all data files; by default, the recipe's files, if
            the adapter's folder is still beside the recipe.
        display: Display of the progress; None to show nothing.

    Raises:
        InputError: If the manifest records no recipe, or base or data are missing or differ.
    """
    folder = adapter
    if not isinstance(folder, AdapterFolder):
        folder = AdapterFolder(folder, BaseFolder(base) if base else None)
    data = folder.require_manifest().data
    if "recipe" not in data or data["kind"] != "adapter":
        found = "records no recipe" if data["kind"] == "adapter" else "a merged model: it was not trained"
        raise InputError(found, place=str(folder.manifest_file), expected="the manifest of a run, from version 3 on")
    recorded = folder.load_tensors()
    with tempfile.TemporaryDirectory(prefix="rerun-") as temporary, _threads(data):
        elsewhere = tuple(_elsewhere(data))
        # it is compared with the recorded run, whose rows were judged or not
        result = train(_recipe(folder, dataset, Path(temporary) / "adapter"), unjudged=True, display=display)
    return Rerun(
        recorded_sha256=sha256_tensors(recorded),
        sha256=sha256_tensors(result.adapter.tensors),
        distance=_distance(recorded, result.adapter.tensors, result.adapter.initial),
        tolerance=TOLERANCES[data["training"]["precision"]] if elsewhere else 0.0,
        elsewhere=elsewhere,
    )


def _recipe(folder: AdapterFolder, dataset: Path | Sequence[Path] | None, output: Path) -> Recipe:
    """Return the recorded recipe with the present paths of base and data, without loggers and generated answers."""
    data = folder.require_manifest().data
    written = dict(data["recipe"])
    home = recipe_folder(folder.path.resolve(), written["output"])
    files = home if dataset is None else dataset
    train_files, eval_files = training_files(data, files), held_files(data, files)
    if missing := [file for file in train_files if not file.is_file()]:
        raise InputError("no such file", place=str(missing[0]), next_step="Give the files with --dataset.")
    digest = sha256_files(train_files)
    if digest != data["dataset_sha256"]:
        raise InputError(
            f"the data has SHA-256 {digest}",
            place=", ".join(map(str, train_files)),
            expected=f"{data['dataset_sha256']}, as recorded",
            next_step="Give the files with --dataset.",
        )
    written["base"] = _base(folder, home)
    if (start := folder.recorded_start) is not None:
        written["lora"] = {**written["lora"], "start": str(_start(data["lora"]["start"], start))}
    sides = {"train": ("files", train_files), "eval": ("eval_files", eval_files or ())}
    entries = {key: list(_entries(data, name, paths)) for key, (name, paths) in sides.items()}
    written["data"] = {**written["data"], **entries}
    written["training"] = {**written["training"], "report_to": []}
    written["output"] = str(output)
    written.pop("evaluation", None)
    return parse_recipe(written, folder=output.parent, place=Place.of(folder.manifest_file) / "recipe")


def _start(recorded: Mapping[str, Any], start: AdapterFolder) -> Path:
    """Return the folder of the adapter that the run went on from.

    Raises:
        InputError: If it is gone, or its tensors are not the recorded ones.
    """
    if not os.path.lexists(start.tensors_file):
        found = "the adapter that the run went on from is gone: no such file"
        step = f"Put it there: its tensors have SHA-256 {recorded['tensors_sha256']}."
        raise InputError(found, place=str(start.tensors_file), next_step=step)
    if start.tensors_sha256 != recorded["tensors_sha256"]:
        raise InputError(
            f"the tensors of the adapter that the run went on from have SHA-256 {start.tensors_sha256}",
            place=str(start.tensors_file),
            expected=f"{recorded['tensors_sha256']}, as recorded",
        )
    return start.path


def _entries(data: Mapping[str, Any], name: str, paths: Sequence[Path]) -> Iterator[str | dict[str, Any]]:
    """Yield data files as a recipe names them; converted files carry their conversion as the manifest records it.

    Args:
        data: The manifest.
        name: `files` or `eval_files`.
        paths: The files.

    Raises:
        InputError: If a file is not converted to the recorded rows.
    """
    recorded = data["dataset"][name]
    for entry, file in zip(recorded, open_data_files(data, paths, recorded, recorded_file), strict=True):
        named = {"path": str(file.path.resolve())} | {key: entry[key] for key in ("objective",) if key in entry}
        if file.source is None:
            yield named if "objective" in named else named["path"]
            continue
        expected = entry["source"]
        for _ in read_rows(file):
            pass
        found = file.source.facts()["rows_sha256"]
        if found != expected["rows_sha256"]:
            raise InputError(
                f"the file is converted to rows with SHA-256 {found}",
                place=str(file.path),
                expected=f"{expected['rows_sha256']}, as recorded",
                next_step="Use the version of this package that made the adapter.",
            )
        yield named | {key: expected[key] for key in ("format", "lossy", "layout")}


def _base(folder: AdapterFolder, home: Path) -> dict[str, Any]:
    data, base = folder.require_manifest().data, folder.given_base
    written: dict[str, Any] = dict(data["recipe"]["base"])
    if (home / written.get("oracle", "")).is_file():
        written["oracle"] = str((home / written["oracle"]).resolve())
    if base is None and "repo" in written:
        return written
    if base is None and (home / written["path"]).is_dir():
        base = BaseFolder(home / written["path"])
    found = folder.base if base is None else base
    weights = found.weights_sha256
    if weights != data.get("base_weights_sha256", weights):
        raise InputError(
            f"the weights have SHA-256 {weights}",
            place=str(found),
            expected=f"{data['base_weights_sha256']}, as recorded",
            next_step="Give that base with --base.",
        )
    folder.recorded_base.require_config(found)
    local = {"path": str(found.path.resolve()), "weights_sha256": weights, "name": data["base"]}
    return local | {key: written[key] for key in ("oracle", "quantization") if key in written}


@contextmanager
def _threads(data: Mapping[str, Any]) -> Iterator[None]:
    # the number of threads decides the order of sums, and so their rounding
    before = torch.get_num_threads()
    torch.set_num_threads(data["environment"]["threads"])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _elsewhere(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the differences that may lead to other roundings than those of the recorded run."""
    recorded, here = data["environment"], environment()
    for name in ("platform", "processor", "threads", "gpu", "image"):
        if recorded.get(name) != here.get(name):
            yield f"{name} ({here.get(name)})"
    for name in sorted(recorded["packages"].keys() | here["packages"].keys()):
        if recorded["packages"].get(name) != here["packages"].get(name):
            yield f"{name} ({here['packages'].get(name)})"
    if data["training"]["devices"] != 1:
        yield "number of devices (1)"
    if data["training"].get("memory_relief"):
        yield "size of passes, which were made smaller when memory ran out"
    if data["training"]["device"] != "cpu":
        yield "order of sums, as on any GPU"


def _distance(
    recorded: Mapping[str, torch.Tensor], again: Mapping[str, torch.Tensor], initial: Mapping[str, torch.Tensor]
) -> float:
    """Return the distance of `Rerun.distance`; inf for other names or shapes of tensors."""
    if recorded.keys() != again.keys() or any(recorded[name].shape != again[name].shape for name in recorded):
        return float("inf")

    def norm(tensors: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
        squares = (float((tensors[name].double() - other[name].double()).square().sum()) for name in recorded)
        return math.sqrt(sum(squares))

    return norm(recorded, again) / (norm(recorded, initial) or 1.0)
