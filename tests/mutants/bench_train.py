"""The bench of the subject `train`: the functions of the trainer, a finished run, and a loss for another trainer.

A change to a function of the trainer is put where the trainer looks for it; the tiny run and every law that calls the
function are then made again. What calls it was found out by running them once with the trainer as it is.
"""

from __future__ import annotations

from pathlib import Path

from gallery import Artifact
from guarded_step import guarded_findings
from trained_run import SOUND, judged, pristine, run_folder

from pytest_mistral_lora.conformance.finding import Finding


class TrainBench:
    """Makes a finished tiny run and the functions of the trainer, and judges both as the suite does."""

    subject = "train"

    def make(self, folder: Path) -> Artifact:
        """Make a finished run below a folder."""
        clean = pristine()
        return {
            "folder": run_folder(clean, folder),
            "tensors": dict(clean.tensors),
            "initial": dict(clean.initial),
            "layer": max(clean.tensors),
            "base_tensors": dict(clean.base_tensors),
            "losses": list(clean.evidence["losses"]),
            "compute_loss_func": None,
            "guarded": None,
            **SOUND,
        }

    def judge(self, artifact: Artifact) -> list[Finding]:
        """Run every check of the subject on it."""
        loss, guarded = artifact["compute_loss_func"], artifact["guarded"]
        if loss is None and guarded is None:
            return judged(artifact)
        # of another trainer: the run of this package's trainer does not have it
        return guarded_findings(artifact["folder"] / "base", loss, **guarded or {})


BENCH = TrainBench()
