"""The trial of a GPU that `mistral-lora doctor --gpu` makes: its list of runs, and the other trainers beside it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.cli.verb import shown_path
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, MachineError
from pytest_mistral_lora.extras import require_extra

if TYPE_CHECKING:
    from pytest_mistral_lora.training.gpu_trial.report import GpuReport
    from pytest_mistral_lora.training.gpu_trial.shape import Shape
    from pytest_mistral_lora.training.gpu_trial.trials import Trial

GUARDED = "pytest_mistral_lora.guarding.tiny_run"
"""The module of the guarded run. The trainer does not know the guard, and the guard judges any trainer."""


def trials_of_a_gpu() -> tuple[Trial, ...]:
    """Return the tiny runs, those of this trainer and the guarded one."""
    from pytest_mistral_lora.training.gpu_trial.trials import TRIALS, Trial

    shows = "transformers' Trainer under the guard, which stops a run whose EOS is masked"
    return (*TRIALS, Trial("guarded", shows, {"precision": "bf16"}, module=GUARDED))


def try_gpu(folder: Path) -> int:
    """Try the GPUs, and write the report; return 1 if a run on them failed.

    Raises:
        InputError: If the folder exists.
        MachineError: If torch finds no GPU.
    """
    require_extra("train")
    import torch

    from pytest_mistral_lora.records.files import require_new
    from pytest_mistral_lora.training.gpu_trial.shape import SEVEN_B

    require_new(folder)  # before ten minutes of work
    if not torch.cuda.is_available():
        step = "Run it on a machine with a GPU; mistral-lora doctor shows what torch finds."
        raise MachineError("torch finds no CUDA device: no GPU was tried", place="--gpu", next_step=step)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    trials = trials_of_a_gpu()
    report = tried(trials, SEVEN_B, device="cuda", devices=torch.cuda.device_count(), has_bf16=has_bf16)
    report.write(folder)
    sys.stdout.write(f"{shown_path(folder)}\n")
    for name in report.failed:
        sys.stderr.write(f"failed: {name}\n")
    return EXIT_FINDING if report.failed else EXIT_OK


def tried(chosen: Sequence[Trial], shape: Shape, *, device: str, devices: int, has_bf16: bool) -> GpuReport:
    """Run trials, measure steps of a shape, and return the report.

    Args:
        chosen: The tiny runs.
        shape: The shape.
        device: `cuda`; `cpu` tries the trial itself.
        devices: The number of GPUs.
        has_bf16: Whether the device computes in bf16.
    """
    from pytest_mistral_lora.environment import installed_versions
    from pytest_mistral_lora.environment.machine import machine_facts, torch_build
    from pytest_mistral_lora.training.display import RunDisplay
    from pytest_mistral_lora.training.gpu_trial.reference import recorded
    from pytest_mistral_lora.training.gpu_trial.report import GpuReport
    from pytest_mistral_lora.training.gpu_trial.shape import TARGETS, measure
    from pytest_mistral_lora.training.gpu_trial.trials import Trials

    display, results, shapes = RunDisplay.on_stderr(), [], []
    with tempfile.TemporaryDirectory() as work:
        trials = Trials(Path(work), device=device, devices=devices, has_bf16=has_bf16, reference=recorded())
        for trial in chosen:
            results.append(found := trials.run(trial))
            display.line(f"{trial.name}: {found.verdict}")
        differences = trials.differences
    for targets in TARGETS if has_bf16 else ():
        display.phase(f"steps of 7B's shape, adapter on {targets}")
        with redirect_stdout(sys.stderr):  # other trainers print their figures
            shapes += measure(shape, device=device, targets=targets, peers=_peers())
    machine = machine_facts(installed_versions(), torch_build())
    return GpuReport(results, differences, shapes, display.seconds, machine)


def _peers() -> dict[str, Any]:
    """Return what makes the training loop of each other trainer, by its title; None if it is not installed."""
    from pytest_mistral_lora.chat.rows import imported
    from pytest_mistral_lora.extras import is_installed
    from pytest_mistral_lora.runners import TRAINERS

    timed = [trainer for trainer in TRAINERS.values() if trainer.timed]
    return {trainer.title: imported(trainer.timed) if is_installed(trainer.module) else None for trainer in timed}
