"""TRL: how its own code is run, and what it is called."""

from __future__ import annotations

from pathlib import Path

from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer

TRL = Trainer.packaged(
    Path(__file__).parent,
    "trl",
    "TRL",
    "trl",
    "trl sft --config",
    tasks=PreferenceTasks(("dpo", "reward", "kto"), ("kto",)),
    exporter="pytest_mistral_lora.field.trainers.trl.export:TRL",
    observers=("pytest_mistral_lora.field.trainers.trl.cut_pairs:CUT_PAIRS",),
)
