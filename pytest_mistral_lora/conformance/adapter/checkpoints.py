"""The checkpoints of a training run that stand below an adapter: a later one means that the adapter is old."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.tensors import ADAPTER_TENSORS

TRAINER_STATE = "trainer_state.json"
"""The state of transformers' Trainer, with the optimizer step at which it was saved."""

_APART = 600.0
"""Seconds between the times of two files that a copy of the folder does not explain."""


def checkpoint_findings(folder: AdapterFolder) -> Iterator[Finding]:
    """Yield ML455 if a checkpoint below the folder has a later step than the adapter, or was written after it.

    An adapter with the bytes of the last checkpoint is that checkpoint, and one that the state calls the best of the
    run was chosen.
    """
    found = [(step, path) for path in folder.path.glob("checkpoint-*") if (step := _step_of(path)) is not None]
    if not found or not folder.tensors_file.is_file():
        return
    step, last = max(found)
    tensors = last / ADAPTER_TENSORS
    if _is_same(folder.tensors_file, tensors) or _is_best(folder, last):
        return
    expected = f"the adapter of {last.name}, or no older one beside it"
    at_top = state_of(folder.path).get("global_step")
    if type(at_top) is int:
        if at_top < step:
            text = f"was saved at step {at_top}, and {last.name} below it at step {step}"
            yield Finding("ML455", text, Place.of(folder.tensors_file), expected, severity="error")
        return
    later = tensors.stat().st_mtime - folder.tensors_file.stat().st_mtime
    if later > _APART:
        text = f"is {later / 60:,.0f} minutes older than {last.name} below it, and nothing tells its step"
        yield Finding("ML455", text, Place.of(folder.tensors_file), expected)


def _step_of(checkpoint: Path) -> int | None:
    """Return the step of a checkpoint with an adapter, by its state or else by its name; None for another folder."""
    if not (checkpoint / ADAPTER_TENSORS).is_file():
        return None
    step = state_of(checkpoint).get("global_step")
    if type(step) is int:
        return step
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isascii() and number.isdecimal() and len(number) < 12 else None


def state_of(folder: Path) -> dict[str, Any]:
    """Return the state of the trainer in a folder; empty without one that can be read."""
    with suppress(InputError, OSError):
        state = read_json(inside(folder, TRAINER_STATE))
        if isinstance(state, dict):
            return state
    return {}


def _is_same(first: Path, second: Path) -> bool:
    return first.stat().st_size == second.stat().st_size and sha256_file(first) == sha256_file(second)


def _is_best(folder: AdapterFolder, last: Path) -> bool:
    """Whether the run's last state names an earlier checkpoint as its best, and the adapter is that one."""
    best = state_of(last).get("best_model_checkpoint")
    if not isinstance(best, str):
        return False
    name = best.replace("\\", "/").rstrip("/").rpartition("/")[2]
    chosen = folder.path / name / ADAPTER_TENSORS
    # the trainer may have removed it since, to keep only the last few
    return name != last.name and (not chosen.is_file() or _is_same(folder.tensors_file, chosen))
