"""TRL: how its own code is run, what it is called, and which of its classes have the loss of labels.

The classes of LLaMA-Factory and Axolotl are made of those of TRL, and call their `compute_loss`.
"""

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
    importer="pytest_mistral_lora.field.trainers.trl.importer:TRL",
    exporter="pytest_mistral_lora.field.trainers.trl.export:TRL",
    label_losses=frozenset({"SFTTrainer"}),
    is_library=True,
    observers=("pytest_mistral_lora.field.trainers.trl.cut_pairs:CUT_PAIRS",),
)
