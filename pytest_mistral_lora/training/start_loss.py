"""The held-out loss before the first step of a run that goes on from an adapter: it is the last one of that adapter.

The tests prove that PEFT's own `PeftModel.from_pretrained` gives the same loss: a run would need a second copy of the
base for that. In its place, `load_start` reads every value back from the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.places import NOWHERE
from pytest_mistral_lora.records.adapter_config import CONFIG
from pytest_mistral_lora.records.data_stats import held_out_hashes
from pytest_mistral_lora.records.parents import facts_of
from pytest_mistral_lora.records.restated import AFTER
from pytest_mistral_lora.training.devices import precision_of
from pytest_mistral_lora.training.prepare import Preparation
from pytest_mistral_lora.training.start import Start

TOLERANCES: Mapping[str, float] = {"fp32": 1e-4, "bf16": 0.02, "fp16": 0.02}
"""Largest difference of the two losses that rounding explains, in nats, by precision.

Measured with runs of a tiny base on a CPU, over 8 held-out rows of some hundred tokens: on one machine, the two are
equal bit for bit with any batch, micro-batch, shared prefix or number of threads. PyTorch and MKL without vector
instructions gave 1.1e-7 in fp32 and 4.1e-5 in bf16. The bounds are some hundred times larger, for other processors and
deeper models; fp16, which needs a GPU and was not measured, has that of bf16.
"""


@dataclass(frozen=True)
class ParentLoss:
    """The last held-out loss of the adapter that a run goes on from.

    Attributes:
        value: Mean over the supervised tokens, in nats; None if it is not comparable with a loss of this run.
        not_compared: Why it is not; empty if it is.
        tolerance: The largest difference, in nats, that rounding explains.
    """

    value: float | None
    not_compared: str
    tolerance: float


def parent_loss(prepared: Preparation) -> ParentLoss:
    """Return the last held-out loss of the adapter that a run goes on from, if its manifest has one of the same rows.

    Args:
        prepared: A run with a `start`.
    """
    manifest = prepared.start.manifest if prepared.start is not None else None
    reason, value = "the parent has no manifest", None
    if manifest is not None:
        losses = [result.get("results", {}).get(AFTER) for result in manifest.data.get("evaluation", ())]
        value = next((loss for loss in losses if isinstance(loss, int | float)), None)
        reason = _why_not_comparable(prepared, manifest.data, has_loss=value is not None)
    return ParentLoss(None if reason else value, reason, TOLERANCES[precision_of(prepared.recipe.training)])


def _why_not_comparable(prepared: Preparation, data: Mapping[str, Any], *, has_loss: bool) -> str:
    """Return why the held-out loss of a manifest is not that of a run's rows; empty if it is."""
    if not prepared.data.held_out.rows:
        return "nothing is held out"
    if not has_loss:
        return "the parent's manifest has no held-out loss"
    recorded, ours = data.get("dataset", {}), held_out_hashes(prepared.data.held_out.figures)
    if any(key not in recorded for key in ours):
        return "the parent's manifest has no hash of its held-out tokens"
    # ids and labels follow from files, split, policy, objective, tokenizer and template: nothing else has to be equal
    causes = ("the parent held out other rows", "the tokens of the held-out rows differ: another tokenizer or template")
    for key, cause in zip(ours, (*causes, "the labels of the held-out rows differ: another objective"), strict=True):
        if recorded[key] != ours[key]:
            return cause
    theirs, recipe = data.get("training", {}), prepared.recipe
    for key, value in (("precision", precision_of(recipe.training)), ("quantization", recipe.base.quantization)):
        if theirs.get(key) != value:
            return f"the parent's {key} is {theirs.get(key) or 'none'}, and here it is {value or 'none'}"
    return ""


def start_facts(prepared: Preparation, start: Start, log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the manifest's `lora.start`: the adapter that a run went on from, and the line of its parents.

    Args:
        prepared: The run.
        start: The adapter.
        log: Lines of the training log.
    """
    parent = parent_loss(prepared)
    first = next((line["eval_loss"] for line in log if "eval_loss" in line and line["step"] == 0), None)
    return {
        "path": start.written,
        **start.identity,
        "config_sha256": start.folder.sha256(CONFIG),
        **facts_of({} if start.manifest is None else start.manifest.data),
        "held_out_loss": first,
        "parent_held_out_loss": parent.value,
        **({"not_compared": parent.not_compared} if parent.not_compared else {}),
    }


class CompareFirstLoss(TrainerCallback):
    """Stops a run before its first step if its held-out loss is not the last one of the adapter that it goes on from.

    Attributes:
        parent: That loss.
    """

    def __init__(self, parent: ParentLoss) -> None:
        self.parent: ParentLoss = parent

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Compare the loss.

        Raises:
            TrainingError: If the two differ by more than rounding explains.
        """
        expected, tolerance = self.parent.value, self.parent.tolerance
        if state.global_step or expected is None or abs(metrics["eval_loss"] - expected) <= tolerance:
            return
        raise TrainingError(
            f"the held-out loss before the first step is {metrics['eval_loss']:.6g}, and the adapter that the run "
            f"starts from ended with {expected:.6g} on the same rows",
            place=NOWHERE.within("lora", "start"),
            expected=f"a difference of at most {tolerance:g}",
            next_step="Nothing is trained. Run mistral-lora verify on that adapter: its record or its base is wrong.",
        )
