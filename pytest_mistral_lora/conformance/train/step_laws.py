"""Laws of one optimizer step: its loss and gradients, compared with plain transformers in float64, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import (
    ROWS_OF_STEP,
    SCALE,
    Figures,
    StepRecord,
    TrainerHarness,
    TrainingLaw,
)
from pytest_mistral_lora.places import NOWHERE

if TYPE_CHECKING:
    import torch


TOLERANCE = {"cpu": 2e-4, "cuda": 5e-3}
"""Largest relative difference that another order of float32 sums explains; a fused loss needs 1e-4 on a CPU."""

_PREFIX = "base_model.model."
# transformers' Trainer may round a logged loss to four digits.
_LOG_DIGITS = 1e-4


@dataclass(frozen=True)
class ReferenceStep:
    """The loss of some rows and its gradient by an adapter, computed without the trainer.

    Attributes:
        loss: Mean over the supervised tokens of all rows, in nats.
        tokens: Number of supervised tokens.
        gradients: By the adapter's names; CPU float64.
    """

    loss: float
    tokens: int
    gradients: Mapping[str, torch.Tensor]


def plain_model(base: Path, dtype: torch.dtype) -> Any:
    """Return a checkpoint loaded by plain transformers, on the CPU, in eval mode."""
    from pytest_mistral_lora.checkpoint.base_folder import BaseFolder

    model_class = BaseFolder(base).architecture.model_class()
    return model_class.from_pretrained(base, dtype=dtype, use_safetensors=True, local_files_only=True).eval()


def merge_by_hand(
    weights: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    """Return `W + scale * B @ A` for each adapted weight, in the weight's dtype.

    Args:
        weights: The base's tensors, by their names in memory.
        adapter: The adapter's, by the names of `adapter_model.safetensors`.
        scale: alpha / r.
    """
    merged = {}
    for name, down in adapter.items():
        if ".lora_A." in name:
            weight = name.removeprefix(_PREFIX).replace(".lora_A.", ".")
            up = adapter[name.replace(".lora_A.", ".lora_B.")]
            dtype = weights[weight].dtype
            merged[weight] = weights[weight] + scale * up.to(dtype) @ down.to(dtype)
    return merged


def supervised_positions(row: EncodedRow) -> list[tuple[int, int]]:
    """Return position and id of each supervised token of a row."""
    return [(place, label) for place, label in enumerate(row.labels or ()) if label != IGNORE_INDEX]


def reference_step(
    base: Path, adapter: Mapping[str, torch.Tensor], scale: float, rows: Sequence[EncodedRow]
) -> ReferenceStep:
    """Return the loss of rows under base and adapter, and its gradient, by plain transformers and autograd.

    With N supervised tokens t over all rows, `loss = -1/N * sum(log p(t | tokens before t))`. Each row has its own
    forward pass, unpadded, in float64, with eager attention and without PEFT: nothing is shared with the trainer.

    Args:
        base: A checkpoint folder.
        adapter: The adapter's tensors, by the names of `adapter_model.safetensors`.
        scale: alpha / r.
        rows: Encoded rows with labels.
    """
    import torch

    model = plain_model(base, torch.float64)
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch lacks a grouped product in float64
    model.requires_grad_(False)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in adapter.items()}
    weights = merge_by_hand(model.state_dict(), leaves, scale)
    losses = []
    for row in rows:
        call = {"input_ids": torch.tensor([row.input_ids]), "use_cache": False}
        log_probs = torch.func.functional_call(model, weights, kwargs=call).logits[0].log_softmax(dim=-1)
        # the logits at one token predict the next
        losses += [-log_probs[place - 1, token] for place, token in supervised_positions(row)]
    loss = torch.stack(losses).sum() / len(losses)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return ReferenceStep(loss.item(), len(losses), dict(zip(leaves, gradients, strict=True)))


def step_difference(step: StepRecord, loss: float, gradients: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Compare a step with an expected loss and gradients.

    Returns:
        `loss`, `expected_loss`; `gradient`: the largest absolute error of a tensor, divided by its largest expected
        entry; `missing`: names that only one side has.
    """
    # relative to the largest entry: the relative error of a tiny entry means nothing
    both = step.gradients.keys() & gradients.keys()
    errors = [float((step.gradients[n].double() - gradients[n]).abs().max() / gradients[n].abs().max()) for n in both]
    return {
        "loss": step.loss,
        "expected_loss": loss,
        "gradient": max(errors, default=0.0),
        "missing": sorted(gradients.keys() ^ step.gradients.keys()),
    }


def judge_difference(figures: Figures, device: str, *, rule: str, subject: str, expected: str) -> Iterator[Finding]:
    """Yield findings about figures of `step_difference`."""
    if figures["missing"]:
        names = ", ".join(figures["missing"][:3])
        yield Finding(rule, f"{subject}: {len(figures['missing'])} tensors lose or gain a gradient, first {names}")
    tolerance = TOLERANCE[device]
    apart = abs(figures["loss"] - figures["expected_loss"])
    # "not <=" in place of ">": NaN must be a finding
    if not apart <= _LOG_DIGITS + tolerance * abs(figures["expected_loss"]):
        found = f"{subject}: the loss is {figures['loss']:.4f}, not {figures['expected_loss']:.4f}"
        yield Finding(rule, found, NOWHERE, expected)
    if not figures["gradient"] <= tolerance:
        yield Finding(
            rule, f"{subject}: gradients are up to {figures['gradient']:.2g} apart, relatively", NOWHERE, expected
        )


def _difference_from_whole(harness: TrainerHarness, step: StepRecord) -> dict[str, Any]:
    whole = harness.whole_step
    return step_difference(step, whole.loss, {name: tensor.double() for name, tensor in whole.gradients.items()})


def measure_accumulation(harness: TrainerHarness) -> Figures:
    """Compare four micro-batches of one row each with one micro-batch of four; the rows differ in length."""
    return _difference_from_whole(harness, harness.step(micro_batch_tokens=1))


def measure_neighbours(harness: TrainerHarness) -> Figures:
    """Compare a step whose rows have padding after them with the plain step, and rows together with single rows."""
    import torch

    from pytest_mistral_lora.training.rows import RowDataset
    from pytest_mistral_lora.training.step import forward

    # EOS as padding is the common mistake: a mask by id, not by place, then also drops the last EOS from the loss
    pads = {"padded with EOS": harness.encoder.eos_id, "padded with the last id": harness.encoder.vocab_size - 1}
    figures = {
        name: _difference_from_whole(harness, harness.step(change_batch=partial(_pad_batch, pad)))
        for name, pad in pads.items()
    }
    trainer = harness.trainer(harness.perturbed_model(), harness.recipe())
    dataset = RowDataset(harness.encoded[:ROWS_OF_STEP])
    rows = forward.step_rows(forward.collate([dataset[place] for place in range(len(dataset))]))
    trained = {name: tensor for name, tensor in trainer.model.named_parameters() if tensor.requires_grad}
    steps = []
    for parts in ([rows], [[row] for row in rows]):
        losses = [forward.supervised_losses(trainer.model, part, inner=trainer.model)[0] for part in parts]
        loss = torch.cat(losses).mean()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        steps.append(StepRecord(loss.item(), dict(zip(trained, gradients, strict=True))))
    together, alone = steps
    expected = {name: tensor.double() for name, tensor in alone.gradients.items()}
    return {**figures, "rows beside one another": step_difference(together, alone.loss, expected)}


def _pad_batch(pad: int, batch: dict[str, Any]) -> dict[str, Any]:
    """Return a collated batch with unlabelled padding after every row but the longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    padded = {}
    for name, value in (("input_ids", pad), ("labels", IGNORE_INDEX)):
        rows = list(torch.split(batch[name], batch["lengths"].tolist()))
        padded[name] = pad_sequence(rows, batch_first=True, padding_value=value)
    lengths = batch["lengths"].new_full((len(padded["labels"]),), padded["labels"].shape[1])
    return {**batch, **{name: rows.flatten() for name, rows in padded.items()}, "lengths": lengths}


def measure_loss(harness: TrainerHarness) -> Figures:
    """Compare the step with the float64 reference: the mean over the supervised tokens of all its rows."""
    from pytest_mistral_lora.training.adapter import adapter_tensors

    adapter = adapter_tensors(harness.perturbed_model())
    truth = reference_step(harness.base, adapter, SCALE, harness.encoded[:ROWS_OF_STEP])
    return {**step_difference(harness.whole_step, truth.loss, truth.gradients), "supervised": truth.tokens}


def measure_predicting(harness: TrainerHarness) -> Figures:
    """Compare the tokens whose predictions the loss uses with the tokens right before a supervised one."""
    rows = harness.encoded[:ROWS_OF_STEP]
    wanted = Counter(row.input_ids[place - 1] for row in rows for place, _ in supervised_positions(row))
    found = Counter(harness.whole_step.predicting)
    return {"extra": sorted((found - wanted).elements()), "lacking": sorted((wanted - found).elements())}


def measure_checkpointing(harness: TrainerHarness) -> Figures:
    """Compare a step with activation checkpointing with the step without it."""
    return _difference_from_whole(harness, harness.step(activation_checkpointing=True))


def measure_cache(harness: TrainerHarness) -> Figures:
    """Count the passes that make a key-value cache, in training and in the held-out loss."""
    calls = harness.step(held_out=2).calls
    figures = {}
    for name, training in (("training", True), ("held-out loss", False)):
        chosen = [call for call in calls if call.training is training]
        figures[name] = {"passes": len(chosen), "with_cache": sum(call.has_cache for call in chosen)}
    return figures


def _judge_neighbours(figures: Figures, device: str) -> Iterator[Finding]:
    for name, difference in figures.items():
        expected = "the same, whatever stands beside a row"
        yield from judge_difference(difference, device, rule="ML311", subject=name, expected=expected)


def _judge_loss(figures: Figures, device: str) -> Iterator[Finding]:
    expected = f"the mean over {figures['supervised']} supervised tokens, as in float64"
    subject = f"a step of {ROWS_OF_STEP} rows"
    yield from judge_difference(figures, device, rule="ML311", subject=subject, expected=expected)


def _judge_predicting(figures: Figures, device: str) -> Iterator[Finding]:
    if figures["extra"]:
        found = f"a gradient after {len(figures['extra'])} tokens more, first after id {figures['extra'][0]}"
        yield Finding("ML311", found, NOWHERE, "none where the next label is -100")
    if figures["lacking"]:
        found = f"no gradient after {len(figures['lacking'])} tokens, first after id {figures['lacking'][0]}"
        yield Finding("ML311", found, NOWHERE, "one where the next token is supervised")


def _judge_cache(figures: Figures, device: str) -> Iterator[Finding]:
    for name, counts in figures.items():
        # without any pass, the recording missed them, and nothing would be checked
        if counts["with_cache"] or not counts["passes"]:
            found = f"{counts['with_cache']} of {counts['passes']} passes make a key-value cache"
            yield Finding("ML311", found, NOWHERE / name, "none, in at least one pass")


_judge_accumulation = partial(
    judge_difference, rule="ML311", subject="4 micro-batches of a row", expected="those of one batch of 4 rows"
)
_judge_checkpointing = partial(
    judge_difference, rule="ML315", subject="with activation checkpointing", expected="those without it"
)

STEP_LAWS = (
    TrainingLaw("ML311.mean", measure_loss, _judge_loss),
    TrainingLaw("ML311.tokens", measure_predicting, _judge_predicting),
    TrainingLaw("ML311.batches", measure_accumulation, _judge_accumulation),
    TrainingLaw("ML311.neighbours", measure_neighbours, _judge_neighbours),
    TrainingLaw("ML311.cache", measure_cache, _judge_cache),
    TrainingLaw("ML315", measure_checkpointing, _judge_checkpointing),
)
