"""TRL: how its own code is run, what it is called, and which of its classes have the loss of labels.

The classes of LLaMA-Factory and Axolotl are made of those of TRL, and call their `compute_loss`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import ANSWERS, Declaration
from pytest_mistral_lora.runners.tasks import PreferenceTasks
from pytest_mistral_lora.runners.trainer import AnswerLoss, Trainer

_OF_ANSWERS = ("DPOTrainer", "KTOTrainer")
"""The classes whose loss depends on the sum of the probabilities' logarithms of each answer."""

_WITH_SIGNS = frozenset(
    {
        "sigmoid",
        "sigmoid_norm",
        "hinge",
        "robust",
        "bco_pair",
        "aot",
        "aot_unpaired",
        "apo_zero",
        "sft",
        "kto",
        "apo_zero_unpaired",
    }
)
"""The types of loss that raise no rejected answer, and lower no chosen one.

The others may: `ipo`, `exo_pair` and `sppo_hard` past a margin, `nca_pair` and `apo_down` the chosen answers, and
`discopop` both at the first step.
"""


class Trl(Trainer):
    """TRL."""

    def answer_loss(self, name: str, settings: Mapping[str, Any]) -> AnswerLoss | None:
        """Return what the arguments of `DPOTrainer` and `KTOTrainer` say of their losses."""
        if name not in _OF_ANSWERS:
            return None
        types = settings.get("loss_type") or ""
        types = [types] if isinstance(types, str) else [str(each) for each in types]
        weights = [settings.get("beta", 0.0), *(settings.get("loss_weights") or ())]
        weights += [settings.get(key, 1.0) for key in ("desirable_weight", "undesirable_weight")]
        is_smoothed = bool(settings.get("label_smoothing")) and types != ["robust"]
        has_signs = _WITH_SIGNS.issuperset(types) and min(weights) >= 0 and not is_smoothed
        return AnswerLoss(name, ", ".join(types), has_signs, has_tail=settings.get("ld_alpha") not in (None, 1.0))

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
