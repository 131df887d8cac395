"""TRL: how its own code is run, what it is called, and which of its classes have the loss of labels.

The classes of LLaMA-Factory and Axolotl are made of those of TRL, and call their `compute_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import ANSWERS, Declaration
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import Trainer


class Trl(Trainer):
    """TRL."""

    def declares(self, settings: Mapping[str, Any]) -> Declaration | None:
        """Return what `assistant_only_loss` declares.

        Its arguments do not tell what was written from a default, and by default every token of messages is trained on:
        nothing else declares.
        """
        if settings.get("assistant_only_loss") is True:
            return Declaration(ANSWERS, "assistant_only_loss: true")
        return None


TRL = Trl.packaged(
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
