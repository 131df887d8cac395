"""The tiny run of the gallery: made once, and judged again where something that it depends on has changed."""

from __future__ import annotations

import atexit
import functools
import pkgutil
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from trained import copied

from pytest_mistral_lora import training
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.row_files import read_rows
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train import tiny_run
from pytest_mistral_lora.conformance.train.checks import checks
from pytest_mistral_lora.conformance.train.harness import Figures, TrainerHarness
from pytest_mistral_lora.conformance.train.model_laws import packed_call
from pytest_mistral_lora.conformance.train.saved_adapter import merged_model
from pytest_mistral_lora.conformance.train.tiny_run import LAWS, take_figures
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.training.adapter import adapted_layers, attach_adapter, base_tensors
from pytest_mistral_lora.training.generate import generate
from pytest_mistral_lora.training.generate.model_spec import model_spec, smoke
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.rows.loading import _accepted_data, load_data
from pytest_mistral_lora.training.step.forward import collate, supervised_losses
from pytest_mistral_lora.training.step.memory_need import checkpoint_activations
from pytest_mistral_lora.training.step.trainer import LoraTrainer

TARGET = "spm-v3"

SOUND: dict[str, Callable[..., Any]] = {
    "compute_loss": LoraTrainer.compute_loss,
    "supervised_losses": supervised_losses,
    "collate": collate,
    "load_data": load_data,
    "accepted_data": _accepted_data,
    "load_base": load_base,
    "adapted_layers": adapted_layers,
    "attach_adapter": attach_adapter,
    "checkpoint_activations": checkpoint_activations,
    "make_trainer": make_trainer,
    "generate": generate,
    "merged": merged_model,
    "packed_call": packed_call,
}
"""The functions that a change may replace, as they are. Where the package holds them is found out: see `_holders`."""

_OF_FILES = {law.measure.__name__ for law in LAWS if law.needs_adapter}
"""Laws that look at the trained adapter's files."""


@functools.cache
def _holders() -> dict[str, list[tuple[Any, str]]]:
    """Return every module and class of the package that holds one of the functions, and under which name.

    All modules of the trainer are imported first: one that was imported within `_put` would keep what it found there.
    """
    for module in pkgutil.walk_packages(training.__path__, f"{training.__name__}."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "pytest_mistral_lora"]
    owners: list[ModuleType | type] = [*modules]
    owners += {value for module in modules for value in vars(module).values() if isinstance(value, type)}
    found: dict[str, list[tuple[Any, str]]] = {name: [] for name in SOUND}
    for owner in owners:
        for attribute, value in list(vars(owner).items()):
            for name, function in SOUND.items():
                if value is function:
                    found[name].append((owner, attribute))
    return found


@contextmanager
def _put(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Put functions everywhere where the package holds the sound ones."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            for owner, attribute in _holders()[name]:
                patch.setattr(owner, attribute, function)
        yield


@dataclass(frozen=True)
class Pristine:
    """The run of the trainer as it is.

    Attributes:
        folder: Where it is.
        evidence: What `evidence.json` says.
        used: Which functions each law, and the run itself (`trained`), calls.
        tensors: The adapter after training.
        initial: The adapter before.
        base_tensors: The base after training.
        files: What its files are.
    """

    folder: Path
    evidence: Mapping[str, Any]
    used: Mapping[str, set[str]]
    tensors: Mapping[str, Any]
    initial: Mapping[str, Any]
    base_tensors: Mapping[str, Any]
    files: Mapping[str, Any]


@functools.cache
def pristine() -> Pristine:
    """Make the tiny run as the suite does, and note which functions its parts call."""
    work = Path(tempfile.mkdtemp(prefix="tiny-run-"))
    atexit.register(shutil.rmtree, work, ignore_errors=True)
    oracle = Oracle(shipped_tokenizer(TARGET))
    used: dict[str, set[str]] = {}
    with tiny_run.quiet_single_thread():
        # the folder's name is the suite's, which looks for the evidence there
        harness = tiny_run.make_inputs(oracle, tiny_run.folder_of(oracle, work, "cpu"), "cpu")
        with _put(_noting(used.setdefault("trained", set()))):
            result = tiny_run.train_adapter(harness)
            evidence = {**tiny_run.observe_run(result), "smoke": _ask_here(harness.folder, "cpu")}
        figures = {}
        for measure in dict.fromkeys(law.measure for law in LAWS):
            with _put(_noting(used.setdefault(measure.__name__, set()))):
                # a copy of the harness has nothing in its caches, so that each law calls what it needs
                figures[measure.__name__] = take_figures(measure, replace(harness))
        shutil.rmtree(harness.scratch)
    adapter, base = result.adapter, base_tensors(result.model)
    evidence = {"device": "cpu", **evidence, "laws": figures}
    return Pristine(harness.folder, evidence, used, adapter.tensors, adapter.initial, base, _files(harness.folder))


def _noting(seen: set[str]) -> dict[str, Callable[..., Any]]:
    """Return the sound functions, each of which adds its name to a set when it is called."""

    def noting(name: str) -> Callable[..., Any]:
        @functools.wraps(SOUND[name])
        def note(*given: Any, **named: Any) -> Any:
            seen.add(name)
            return SOUND[name](*given, **named)

        return note

    return {name: noting(name) for name in SOUND}


def _files(folder: Path) -> dict[str, Any]:
    """Return what tells whether a file has changed; the base's weights are a hard link."""
    small = [
        path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in (".jsonl", ".json", ".jinja")
    ]
    weights = [*folder.glob("adapter/*.safetensors"), *folder.glob("adapter/*.md")]
    found: dict[str, Any] = {path.relative_to(folder).as_posix(): sha256_file(path) for path in (*small, *weights)}
    base = (folder / "base" / "model.safetensors").stat()
    return {**found, "base": (base.st_ino, base.st_size, base.st_mtime_ns)}


def run_folder(clean: Pristine, folder: Path) -> Path:
    """Copy the run to where the suite would have it, below a folder."""
    return copied(clean.folder, folder / clean.folder.name)


def judged(artifact: dict[str, Any]) -> list[Finding]:
    """Judge a run and a trainer as the suite does."""
    folder = artifact["folder"]
    changed = {name: artifact[name] for name in SOUND if artifact[name] is not SOUND[name]}
    with _put(changed), tiny_run.quiet_single_thread():
        write_json(folder / tiny_run.EVIDENCE, _evidence(artifact, set(changed)))
        settings = Settings(20, None, "cpu", False, (), False, folder.parent)
        return [finding for check in checks(Target(TARGET), settings) for finding in check.run().findings]


def _evidence(artifact: dict[str, Any], changed: set[str]) -> dict[str, Any]:
    """Take the evidence again, as far as it depends on what has changed."""
    clean, folder = pristine(), artifact["folder"]
    harness = TrainerHarness(folder, folder / "laws", "cpu")
    touched = _files(folder) != clean.files
    evidence = {
        **clean.evidence,
        "changed_base_tensors": tiny_run.changed_base_tensors(harness.base, artifact["base_tensors"]),
        "unmoved_tensors": tiny_run.unmoved_tensors(artifact["initial"], artifact["tensors"]),
        "losses": artifact["losses"],
    }
    if changed & clean.used["trained"]:
        shutil.rmtree(harness.adapter)
        again = tiny_run.train_and_observe(harness, _ask_here)
        evidence = {"device": "cpu", "laws": evidence["laws"], **again}
    elif touched:
        try:
            evidence["smoke"] = _ask_here(folder, "cpu")
        except Exception as error:
            evidence["failed"] = str(error)
    names = {name for name, used in clean.used.items() if used & changed} | (_OF_FILES if touched else set())
    return {**evidence, "laws": {**evidence["laws"], **_measured(harness, names)}}


def _ask_here(folder: Path, device: str) -> dict[str, Any]:
    """Return what a new process would see of the adapter, whose trainer is broken alike."""
    rows = list(read_rows(folder / "rows.jsonl"))
    return smoke(model_spec(folder / "adapter", folder / "base", device=device), rows, max_new_tokens=64)


def _measured(harness: TrainerHarness, names: set[str]) -> dict[str, Figures]:
    harness.scratch.mkdir(exist_ok=True)
    chosen = dict.fromkeys(law.measure for law in LAWS if law.measure.__name__ in names)
    figures = {measure.__name__: take_figures(measure, harness) for measure in chosen}
    shutil.rmtree(harness.scratch, ignore_errors=True)
    return figures
