"""The tiny end-to-end train: the trainer's own code on a seeded tiny Mistral with the target's real tokenizer.

It runs once for a target and a session. What the checks need of it is written down as plain data, so that the
workers of pytest-xdist share one run.
"""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.train.new_process import ForkedProcess, in_a_new_process
from pytest_mistral_lora.errors import MistralLoraError, TokenizerError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.goldens import goldens_folder

if TYPE_CHECKING:
    import torch

STEPS = 40

Asker = Callable[[Path, str], dict[str, Any]]
"""Loads the saved adapter of a folder on a device, in another process, and returns its answers."""


@dataclass(frozen=True, slots=True)
class TinyRun:
    """What a tiny run left.

    Attributes:
        folder: Where everything of the run is.
        evidence: What was seen while the trained model was in memory, and the figures of the laws, as plain data.
        smoke: What a new process saw of the saved adapter; empty if the run failed.
        failed: Why there is no trained adapter, or an empty string. The laws are measured all the same.
    """

    folder: Path
    evidence: dict[str, Any]
    smoke: dict[str, Any]
    failed: str = ""

    @property
    def device(self) -> str:
        """Where models run: `cpu` or `cuda`."""
        return str(self.evidence["device"])

    @property
    def adapter(self) -> Path:
        """The adapter folder."""
        return self.folder / "adapter"

    @property
    def base(self) -> Path:
        """The tiny base checkpoint."""
        return self.folder / "base"

    @property
    def rows(self) -> Path:
        """The training rows."""
        return self.folder / "rows.jsonl"


def start(target: Target, work_folder: Path, *, device: str) -> subprocess.Popen[bytes] | None:
    """Start the tiny run of a target in a new process, for `attempt` to wait for; None if it has no tokenizer.

    If the process ends early, `attempt` does it again.
    """
    try:
        file = target.oracle.path
    except TokenizerError:
        return None
    command = [sys.executable, "-m", __name__, str(file), str(work_folder), device]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def tiny_run(oracle: Oracle, work_folder: Path, *, device: str) -> TinyRun:
    """Return the tiny run of a tokenizer, trained now or by another worker of this session.

    Args:
        oracle: The tokenizer.
        work_folder: Folder of the session.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        MistralLoraError: If the run fails; what it says is the cause.
    """
    run = attempt(oracle, work_folder, device=device)
    if run.failed:
        raise MistralLoraError(run.failed, place=str(run.folder))
    return run


def attempt(oracle: Oracle, work_folder: Path, *, device: str, is_new: bool = False) -> TinyRun:
    """Return the tiny run of a tokenizer as `tiny_run` does, or one that says why it failed.

    Args:
        oracle: The tokenizer.
        work_folder: Folder of the session.
        device: `auto`, `cpu` or `cuda`.
        is_new: Whether this process was started for the run alone: then a copy of it can ask the saved adapter.

    Raises:
        MistralLoraError: If there is no tiny model for this tokenizer.
    """
    folder = work_folder / f"train-{oracle.sha256[:12]}-{device}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "evidence.json").is_file():
            with undisturbed():
                ask = ForkedProcess().ask if is_new and ForkedProcess.is_possible() else in_a_new_process
                _attempt(oracle, folder, device, ask)
    evidence = read_json(folder / "evidence.json")
    return TinyRun(folder, evidence, evidence.pop("smoke", {}), evidence.pop("failed", ""))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Train tiny models as fast as it goes; libraries may warn, but what they warn of is no figure."""
    with _one_thread(), _few_objects(), _transformers_quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one CPU thread: the tiny model's operations are too small to share, and waiting for a busy core is slow."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _attempt(oracle: Oracle, folder: Path, device: str, ask: Asker) -> None:
    import torch

    from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

    shutil.rmtree(folder, ignore_errors=True)  # a process that was killed leaves a part
    folder.mkdir()
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", folder / "rows.jsonl")
    write_tiny_base(folder / "base", oracle.path)
    where = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
    evidence = {"device": where, **trained(folder, device, ask), "laws": _laws(folder, device)}
    write_json(folder / "evidence.json", evidence)


def trained(folder: Path, device: str, ask: Asker) -> dict[str, Any]:
    """Train the adapter of a folder that has base and rows, and ask it; return the evidence, or `failed` alone."""
    try:
        return {**_seen_in_training(folder, device), "smoke": ask(folder, device)}
    except MistralLoraError as error:
        return {"failed": str(error)}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _seen_in_training(folder: Path, device: str) -> dict[str, Any]:
    from pytest_mistral_lora.training.adapter import base_tensors
    from pytest_mistral_lora.training.run import train

    result = train(_recipe(folder, device))
    return {
        "changed_base_tensors": changed_base_tensors(result.base_folder, base_tensors(result.model)),
        "unmoved_layers": unmoved_layers(result.adapter.initial, result.adapter.tensors),
        "losses": [line["loss"] for line in result.log if "loss" in line],
        "probe_sha256": result.probe.sha256,
        "label_logits": [list(row) for row in result.probe.label_logits],
    }


def _recipe(folder: Path, device: str) -> Any:
    from pytest_mistral_lora.records.hashing import base_weights_sha256
    from pytest_mistral_lora.training.recipe import parse_recipe

    data = {
        "base": {"path": "base", "weights_sha256": base_weights_sha256(folder / "base")},
        "data": {"train": ["rows.jsonl"]},
        "lora": {"r": 8, "alpha": 16},
        "training": {
            "steps": STEPS,
            "learning_rate": 0.01,
            "schedule": "constant",
            "batch_size": 5,
            "logging_steps": 1,
            "seed": 0,
            "precision": "fp32",
            "device": device,
        },
        "output": "adapter",
    }
    return parse_recipe(data, folder=folder, place="the tiny run's recipe")


def changed_base_tensors(base: Path, after: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the tensors of a base that are not as its checkpoint has them: there must be none."""
    import torch
    from safetensors.torch import load_file

    before = load_file(base / "model.safetensors")
    same = {name for name in before if name in after and torch.equal(before[name], after[name].cpu())}
    return sorted((before.keys() | after.keys()) - same)


def unmoved_layers(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the tensors of an adapter that training left as they were: there must be none."""
    import torch

    return [name for name, tensor in after.items() if torch.equal(tensor, before[name])]


def _laws(folder: Path, device: str) -> dict[str, Any]:
    """Return the figures of the laws of training, in a folder that is gone afterwards."""
    from pytest_mistral_lora.conformance.train.harness import Bed
    from pytest_mistral_lora.conformance.train.laws import measured

    scratch = folder / "laws"
    scratch.mkdir(exist_ok=True)
    try:
        return measured(Bed(folder, scratch, device))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _few_objects() -> Iterator[None]:
    """Import the libraries, and hide all objects so far from the garbage collector.

    Each Trainer collects when it is made and when it ends. With the libraries' objects, which never become garbage,
    this takes a tenth of the whole run.
    """
    import peft  # noqa: F401
    from transformers import MistralForCausalLM, Trainer  # noqa: F401

    from pytest_mistral_lora.conformance.train import laws  # noqa: F401
    from pytest_mistral_lora.training.generate import compare, generate  # noqa: F401
    from pytest_mistral_lora.training.run import train  # noqa: F401

    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _transformers_quiet() -> Iterator[None]:
    """Keep transformers from warning of what the laws do on purpose, such as padding on the right."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


if __name__ == "__main__":
    attempt(Oracle(sys.argv[1]), Path(sys.argv[2]), device=sys.argv[3], is_new=True)
