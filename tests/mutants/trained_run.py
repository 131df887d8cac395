"""The tiny run of the gallery: made once, and judged again where something that it depends on has changed."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from trained import copied

from pytest_mistral_lora.chat.oracle.mistral_common import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import read_rows
from pytest_mistral_lora.checkpoint import base_model as base_module
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train import laws as semantics
from pytest_mistral_lora.conformance.train import model_laws, tiny_run
from pytest_mistral_lora.conformance.train.checks import checks
from pytest_mistral_lora.conformance.train.harness import Bed, Figures, take
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.hashing import sha256_file
from pytest_mistral_lora.training import adapter, loop, run
from pytest_mistral_lora.training import prepare as preparation
from pytest_mistral_lora.training.generate import callback as watching
from pytest_mistral_lora.training.generate import generate as smoke
from pytest_mistral_lora.training.rows import loading
from pytest_mistral_lora.training.step import forward as passes
from pytest_mistral_lora.training.step import trainer

TARGET = "spm-v3"

_PLACES: dict[str, list[tuple[Any, str]]] = {
    "compute_loss": [(trainer.LoraTrainer, "compute_loss")],
    "supervised_losses": [(passes, "supervised_losses"), (trainer, "supervised_losses")],
    "collate": [(passes, "collate"), (trainer, "collate")],
    "load_data": [(loading, "load_data"), (preparation, "load_data")],
    "load_base": [(base_module, "load_base"), (run, "load_base"), (smoke, "load_base")],
    "adapted_layers": [(adapter, "adapted_layers"), (preparation, "adapted_layers")],
    "attach_adapter": [(adapter, "attach_adapter"), (run, "attach_adapter")],
    "checkpoint_activations": [(loop, "checkpoint_activations")],
    "make_trainer": [(loop, "make_trainer"), (run, "make_trainer")],
    "generate": [(smoke, "generate"), (watching, "generate")],
    "merged": [(model_laws, "merged")],
    "packed_call": [(model_laws, "packed_call")],
}

SOUND: dict[str, Callable[..., Any]] = {name: getattr(*places[0]) for name, places in _PLACES.items()}
"""Each of them as it is."""

_OF_FILES = {law.measure.__name__ for law in semantics.LAWS if law.of_adapter}
"""Laws that look at the trained adapter's files."""


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
    used: dict[str, set[str]] = {}
    kept: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(semantics, "take", lambda measure, bed: _noted(used, measure.__name__, take, measure, _new(bed)))
        own = tiny_run.trained
        patch.setattr(tiny_run, "trained", lambda *given: _noted(used, "trained", own, *given))
        for name, arguments in (
            ("changed_base_tensors", ("", "base_tensors")),
            ("unmoved_layers", ("initial", "tensors")),
        ):
            patch.setattr(tiny_run, name, _keeping(getattr(tiny_run, name), kept, arguments))
        run = tiny_run.tiny_run(Oracle(shipped_tokenizer(TARGET)), work, device="cpu")
    evidence = {**run.evidence, "smoke": run.smoke}
    return Pristine(
        run.folder, evidence, used, kept["tensors"], kept["initial"], kept["base_tensors"], _files(run.folder)
    )


def _new(bed: Bed) -> Bed:
    """Return a bed on which nothing is remembered."""
    return replace(bed)


def _keeping(function: Callable[..., Any], kept: dict[str, Any], names: tuple[str, ...]) -> Callable[..., Any]:
    def keep(*given: Any) -> Any:
        kept.update(zip(names, given, strict=True))
        return function(*given)

    return keep


def _noted(used: dict[str, set[str]], key: str, function: Callable[..., Any], *given: Any) -> Any:
    """Call a function, and note which of the trainer's functions it calls."""
    with _put(_noting(used.setdefault(key, set()))):
        return function(*given)


def _noting(seen: set[str]) -> dict[str, Callable[..., Any]]:
    def noting(name: str) -> Callable[..., Any]:
        @functools.wraps(SOUND[name])
        def note(*given: Any, **named: Any) -> Any:
            seen.add(name)
            return SOUND[name](*given, **named)

        return note

    return {name: noting(name) for name in SOUND}


@contextmanager
def _put(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Put functions where the trainer looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, function in functions.items():
            for owner, attribute in _PLACES[name]:
                patch.setattr(owner, attribute, function)
        yield


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
    with _put(changed), tiny_run.undisturbed():
        write_json(folder / "evidence.json", _evidence(artifact, set(changed)))
        settings = Settings(20, None, "cpu", False, (), False, folder.parent)
        return [finding for check in checks(Target(TARGET), settings) for finding in check.run().findings]


def _evidence(artifact: dict[str, Any], changed: set[str]) -> dict[str, Any]:
    """Take the evidence again, as far as it depends on what has changed."""
    clean, folder = pristine(), artifact["folder"]
    touched = _files(folder) != clean.files
    evidence = {**clean.evidence, **_seen_in_memory(artifact)}
    if changed & clean.used["trained"]:
        shutil.rmtree(folder / "adapter")
        evidence = {"device": "cpu", "laws": evidence["laws"], **tiny_run.trained(folder, "cpu", _in_this_process)}
    elif touched:
        evidence |= _smoked(folder)
    again = {name for name, used in clean.used.items() if used & changed} | (_OF_FILES if touched else set())
    return {**evidence, "laws": {**evidence["laws"], **_measured(folder, again)}}


def _seen_in_memory(artifact: dict[str, Any]) -> dict[str, Any]:
    return {
        "changed_base_tensors": tiny_run.changed_base_tensors(artifact["folder"] / "base", artifact["base_tensors"]),
        "unmoved_layers": tiny_run.unmoved_layers(artifact["initial"], artifact["tensors"]),
        "losses": artifact["losses"],
    }


def _smoked(folder: Path) -> dict[str, Any]:
    try:
        return {"smoke": _in_this_process(folder, "cpu")}
    except Exception as error:
        return {"failed": str(error)}


def _in_this_process(folder: Path, device: str) -> dict[str, Any]:
    """Return what a new process would see of the adapter, whose trainer is broken alike."""
    rows = list(read_rows(folder / "rows.jsonl"))
    return smoke.smoke(folder / "adapter", folder / "base", rows, max_new_tokens=64, device=device)


def _measured(folder: Path, names: set[str]) -> dict[str, Figures]:
    scratch = folder / "laws"
    scratch.mkdir(exist_ok=True)
    bed = Bed(folder, scratch, "cpu")
    chosen = dict.fromkeys(law.measure for law in semantics.LAWS if law.measure.__name__ in names)
    figures = {measure.__name__: take(measure, bed) for measure in chosen}
    shutil.rmtree(scratch, ignore_errors=True)
    return figures
