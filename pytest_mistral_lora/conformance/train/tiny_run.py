"""The tiny end-to-end train: the trainer's own code on a seeded tiny model of the target's class, with its tokenizer.

It runs once per target and session. Its evidence is written as plain JSON data, which the workers of pytest-xdist
share.
"""

from __future__ import annotations

import gc
import math
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from filelock import FileLock

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.devices import choose_device
from pytest_mistral_lora.checkpoint.tiny_model import TinyKind
from pytest_mistral_lora.conformance.train.harness import Figures, TinyFolder, TrainerHarness, TrainingLaw
from pytest_mistral_lora.conformance.train.model_laws import MODEL_LAWS
from pytest_mistral_lora.conformance.train.run_laws import RUN_LAWS
from pytest_mistral_lora.conformance.train.saved_adapter import ADAPTER_LAWS, ForkedProcess, in_a_new_process
from pytest_mistral_lora.conformance.train.step_laws import STEP_LAWS, plain_model
from pytest_mistral_lora.errors import MistralLoraError, NoTemplateError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.goldens import goldens_folder

if TYPE_CHECKING:
    import torch

    from pytest_mistral_lora.training.run import RunResult

LAWS: tuple[TrainingLaw, ...] = (*STEP_LAWS, *RUN_LAWS, *MODEL_LAWS, *ADAPTER_LAWS)
"""Every law of training; measured in the folder of the tiny run."""

STEPS = 40
EVIDENCE = "evidence.json"

_MISTRAL = TinyKind()
_IMPORTED_FIRST = (
    "peft",
    "transformers.models.mistral.modeling_mistral",
    "transformers.trainer",
    "pytest_mistral_lora.training.generate.judge",
    "pytest_mistral_lora.training.run",
)
"""The libraries and the trainer, whose objects are not garbage of a tiny run."""

Asker: TypeAlias = Callable[[Path, str], dict[str, Any]]
"""Loads the saved adapter of a folder on a device, in another process, and returns its answers."""


@dataclass(frozen=True)
class TinyRun(TinyFolder):
    """A tiny run, finished or failed.

    Attributes:
        folder: The folder of the run.
        evidence: Observations of the trained model in memory, and the figures of the laws; plain data.
        smoke: Answers and logits of the saved adapter in a new process; empty if the run failed.
        failed: Why there is no trained adapter, else empty. The laws are measured in either case.
        lacks_template: Whether it failed because the installed mistral-common generates no exact chat template.
    """

    evidence: dict[str, Any] = field(default_factory=dict)
    smoke: dict[str, Any] = field(default_factory=dict)
    failed: str = ""
    lacks_template: bool = False

    @property
    def device(self) -> str:
        """The device of the models: `cpu` or `cuda`."""
        return str(self.evidence["device"])


def tiny_run(oracle: Oracle, work_folder: Path, *, device: str, kind: TinyKind = _MISTRAL) -> TinyRun:
    """Return the tiny run of a tokenizer, from now or from another worker of this session.

    Args:
        oracle: The tokenizer.
        work_folder: Folder of the session.
        device: `auto`, `cpu` or `cuda`.
        kind: The kind of model.

    Raises:
        MistralLoraError: If the run fails, with its cause.
    """
    run = attempt(oracle, work_folder, device=device, kind=kind)
    if run.failed:
        raise MistralLoraError(run.failed, place=str(run.folder))
    return run


def attempt(
    oracle: Oracle, work_folder: Path, *, device: str, kind: TinyKind = _MISTRAL, is_new: bool = False
) -> TinyRun:
    """Return the tiny run of a tokenizer like `tiny_run`, but also a failed run, with its cause.

    Args:
        oracle: The tokenizer.
        work_folder: Folder of the session.
        device: `auto`, `cpu` or `cuda`.
        kind: The kind of model.
        is_new: Whether this process was started only for the run: then its copy can ask the saved adapter.

    Raises:
        MistralLoraError: If no tiny model can be made for this tokenizer.
    """
    folder = folder_of(oracle, work_folder, device, kind)
    # the first process to take the lock makes the run; the others wait, and read its evidence
    with FileLock(f"{folder}.lock"):
        if not (folder / EVIDENCE).is_file():
            with quiet_single_thread():
                # forked before any training
                ask = ForkedProcess().ask if is_new and ForkedProcess.is_possible() else in_a_new_process
                harness = make_inputs(oracle, folder, device, kind)
                evidence = {"device": choose_device(device), **train_and_observe(harness, ask)}
                measures = dict.fromkeys(law.measure for law in LAWS)  # a measurement may serve several laws
                evidence["laws"] = {measure.__name__: take_figures(measure, harness) for measure in measures}
                if "failed" not in evidence:
                    evidence |= judge_files(harness)
                shutil.rmtree(harness.scratch)
            # last: a killed run has no evidence, and is made again
            write_json(folder / EVIDENCE, evidence)
    evidence = read_json(folder / EVIDENCE)
    smoke, failed = evidence.pop("smoke", {}), evidence.pop("failed", "")
    return TinyRun(folder, evidence, smoke, failed, evidence.pop("lacks_template", False))


def folder_of(oracle: Oracle, work_folder: Path, device: str, kind: TinyKind = _MISTRAL) -> Path:
    """Return the folder of a tokenizer's tiny run below the folder of the session."""
    suffix = "" if kind == _MISTRAL else f"-{kind.label}"
    return work_folder / f"train-{oracle.sha256[:12]}{suffix}-{device}"


@contextmanager
def quiet_single_thread() -> Iterator[None]:
    """Run tiny models as fast as possible: one thread, a small heap for the garbage collector, and no warnings."""
    import torch
    from transformers.utils import logging

    for name in _IMPORTED_FIRST:
        import_module(name)
    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    # the operations are too small for several threads: waiting for a busy core costs more than it gains
    torch.set_num_threads(1)
    # Each Trainer collects garbage at its start and its end. With the objects of the libraries, all imported above and
    # never garbage, this takes a tenth of the run. What the process has frozen itself stays frozen afterwards.
    is_frozen = gc.get_freeze_count() > 0
    gc.freeze()
    # the laws do things on purpose that transformers warns about, such as padding on the right
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if not is_frozen:
            gc.unfreeze()
        torch.set_num_threads(threads)


def make_inputs(oracle: Oracle, folder: Path, device: str, kind: TinyKind = _MISTRAL) -> TrainerHarness:
    """Make a folder with rows, a tiny base and an empty `laws`, and replace an existing folder."""
    from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

    shutil.rmtree(folder, ignore_errors=True)  # a killed process leaves a partial run
    harness = TrainerHarness(folder, folder / "laws", device)
    harness.scratch.mkdir(parents=True)
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", harness.rows)
    write_tiny_base(harness.base, oracle.path, architecture=kind.architecture, tied=kind.tied)
    return harness


def train_and_observe(harness: TrainerHarness, ask: Asker) -> dict[str, Any]:
    """Train the adapter of a folder with base and rows, and ask it; return the evidence, or only `failed`."""
    try:
        return {**observe_run(train_adapter(harness)), "smoke": ask(harness.folder, harness.device)}
    except MistralLoraError as error:
        return {"failed": str(error), "lacks_template": isinstance(error, NoTemplateError)}
    except Exception as error:  # a broken trainer can raise anything; the laws are measured nevertheless
        return {"failed": f"{type(error).__name__}: {error}"}


def judge_files(harness: TrainerHarness) -> dict[str, Any]:
    """Judge the saved adapter here, where PEFT is imported: importing it elsewhere takes longer than the check.

    Returns:
        `adapter_findings`, as plain data; empty if this raises: the check then runs again and raises itself.
    """
    from pytest_mistral_lora.conformance.adapter.checks import adapter_findings

    try:
        return {"adapter_findings": [finding.to_json() for finding in adapter_findings(harness.adapter, harness.base)]}
    except Exception:
        return {}


def take_figures(measure: Callable[[TrainerHarness], Figures], harness: TrainerHarness) -> Figures:
    """Return the figures of a measurement; if it raises or returns NaN or infinity, only `failed`, with the reason.

    Where the installed mistral-common generates no exact chat template, a whole run cannot start: `not measured`.
    """
    try:
        figures = measure(harness)
    except NoTemplateError as error:
        return {"not measured": str(error)}
    except Exception as error:  # a broken trainer can raise anything, and the other laws must still be measured
        return {"failed": f"{type(error).__name__}: {error}"}
    odd = [name for name, value in _named_numbers(figures) if not math.isfinite(value)]
    return {"failed": f"not a finite number: {', '.join(odd)}"} if odd else figures


def _named_numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield each number of nested mappings with its keys, joined by dots."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named_numbers(item, f"{name}.{key}".lstrip("."))
    elif isinstance(value, int | float):
        yield name, value


def train_adapter(harness: TrainerHarness) -> RunResult:
    """Make the tiny run, with enough steps for the model to learn its rows by heart."""
    from pytest_mistral_lora.training.run import train

    recipe = harness.recipe(harness.adapter.absolute(), steps=STEPS, batch_size=5, dry_run=True)
    # the packaged rows are odd on purpose, and other checks judge the user's
    return train(recipe, unjudged=True)


def observe_run(result: RunResult) -> dict[str, Any]:
    """Return the observations of a finished run that need its model in memory, as plain data."""
    from pytest_mistral_lora.training.adapter import base_tensors

    return {
        "changed_base_tensors": changed_base_tensors(result.base_folder, base_tensors(result.model)),
        "unmoved_tensors": unmoved_tensors(result.adapter.initial, result.adapter.tensors),
        "losses": [line["loss"] for line in result.log if "loss" in line],
        "probe_sha256": result.probe.sha256,
        "label_logits": [list(row) for row in result.probe.label_logits],
    }


def changed_base_tensors(base: Path, after: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of a base's tensors that differ from its checkpoint, or that only one of the two has."""
    import torch

    before = plain_model(base, torch.float32).state_dict()
    same = {name for name in before if name in after and torch.equal(before[name], after[name].cpu())}
    return sorted((before.keys() | after.keys()) - same)


def unmoved_tensors(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of an adapter's tensors that training did not change."""
    import torch

    return [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
