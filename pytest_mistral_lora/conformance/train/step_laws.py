"""What a step must come to, without the trainer: row by row, unpadded, in float64, with plain transformers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import ROWS, SCALE, TOLERANCE, Bed, Figures, Law, Step

if TYPE_CHECKING:
    import torch


_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Reference:
    """The loss of some rows and its gradient by an adapter.

    Attributes:
        loss: Mean over the supervised tokens of all rows, in nats.
        tokens: How many these are.
        gradients: By the adapter's names; CPU float64.
    """

    loss: float
    tokens: int
    gradients: Mapping[str, torch.Tensor]


def plain_base(folder: Path) -> Any:
    """Return the checkpoint as transformers loads it, in float64 on the CPU, without PEFT."""
    import torch
    from transformers import MistralForCausalLM

    model = MistralForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", use_safetensors=True, local_files_only=True
    )
    return model.eval().requires_grad_(False)


def adapted_weights(
    weights: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], scale: float
) -> dict[str, torch.Tensor]:
    """Return the base's adapted weights with the adapter worked in by hand: `W + scale * B @ A`.

    Args:
        weights: The base's tensors, by the checkpoint's names.
        adapter: The adapter's, by the names of `adapter_model.safetensors`.
        scale: alpha / r.
    """
    found = {}
    for name, down in adapter.items():
        if ".lora_A." in name:
            weight = name.removeprefix(_PREFIX).replace(".lora_A.", ".")
            up = adapter[name.replace(".lora_A.", ".lora_B.")]
            found[weight] = weights[weight] + scale * up.to(weights[weight].dtype) @ down.to(weights[weight].dtype)
    return found


def reference(base: Path, adapter: Mapping[str, torch.Tensor], scale: float, rows: Sequence[EncodedRow]) -> Reference:
    """Return the loss of rows under base and adapter, and its gradient.

    Args:
        base: A checkpoint folder.
        adapter: The adapter's tensors, by the names of `adapter_model.safetensors`.
        scale: alpha / r.
        rows: Encoded rows with labels.
    """
    import torch

    model = plain_base(base)
    leaves = {name: tensor.double().requires_grad_() for name, tensor in adapter.items()}
    changed = adapted_weights(model.state_dict(), leaves, scale)
    losses = torch.cat([_losses(model, changed, row) for row in rows])
    loss = losses.sum() / len(losses)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return Reference(loss.item(), len(losses), dict(zip(leaves, gradients, strict=True)))


def _losses(model: Any, changed: dict[str, torch.Tensor], row: EncodedRow) -> torch.Tensor:
    """Return the loss of each supervised token, each predicted from the tokens before it."""
    import torch

    ids = torch.tensor([row.input_ids])
    output = torch.func.functional_call(model, changed, kwargs={"input_ids": ids, "use_cache": False})
    scores = output.logits[0].log_softmax(dim=-1)
    return torch.stack([-scores[place - 1, token] for place, token in supervised(row)])


def supervised(row: EncodedRow) -> Iterable[tuple[int, int]]:
    """Return place and id of each supervised token."""
    return [(place, label) for place, label in enumerate(row.labels or ()) if label != IGNORE_INDEX]


_LOG_DIGITS = 1e-4
"""The log may round a loss to four digits."""


def compared(step: Step, loss: float, gradients: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Compare a step with what it should be: losses, the largest relative error of a gradient, and who has none."""
    both = step.gradients.keys() & gradients.keys()
    errors = [float((step.gradients[n].double() - gradients[n]).abs().max() / gradients[n].abs().max()) for n in both]
    return {
        "loss": step.loss,
        "expected_loss": loss,
        "gradient": max(errors, default=0.0),
        "missing": sorted(gradients.keys() ^ step.gradients.keys()),
    }


def differences(rule: str, what: str, figures: Figures, device: str, expected: str) -> Iterator[Finding]:
    """Judge figures that `compared` took."""
    if figures["missing"]:
        names = ", ".join(figures["missing"][:3])
        yield Finding(rule, f"{what}: {len(figures['missing'])} tensors lose or gain a gradient, first {names}")
    tolerance = TOLERANCE[device]
    apart = abs(figures["loss"] - figures["expected_loss"])
    if not apart <= _LOG_DIGITS + tolerance * abs(figures["expected_loss"]):
        found = f"{what}: the loss is {figures['loss']:.4f}, not {figures['expected_loss']:.4f}"
        yield Finding(rule, found, "", expected)
    if not figures["gradient"] <= tolerance:
        yield Finding(rule, f"{what}: gradients are up to {figures['gradient']:.2g} apart, relatively", "", expected)


def _against_whole(bed: Bed, step: Step) -> dict[str, Any]:
    whole = bed.whole
    return compared(step, whole.loss, {name: tensor.double() for name, tensor in whole.gradients.items()})


def accumulation(bed: Bed) -> Figures:
    """Compare four micro-batches of a row with one batch of four; the rows are ragged."""
    return _against_whole(bed, bed.step(micro_batch_tokens=1))


def neighbours(bed: Bed) -> Figures:
    """Compare a step whose rows have padding behind them with the step as it is, and rows together with each alone."""
    pads = {"padded with EOS": bed.encoder.eos_id, "padded with the last id": bed.encoder.vocab_size - 1}
    steps = {name: _against_whole(bed, bed.step(collated=partial(_padded, pad))) for name, pad in pads.items()}
    return {**steps, "rows beside one another": _beside(bed)}


def _beside(bed: Bed) -> dict[str, Any]:
    import torch

    from pytest_mistral_lora.training.rows.table import RowDataset
    from pytest_mistral_lora.training.step import forward as passes

    trainer = bed.trainer(bed.model(), bed.recipe())
    dataset = RowDataset(bed.encoded[:ROWS])
    rows = passes.step_rows(passes.collate([dataset[place] for place in range(len(dataset))]))
    named = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
    layouts: dict[str, list[Any]] = {"together": [rows], "alone": [[row] for row in rows]}
    found = {}
    for name, parts in layouts.items():
        losses = [passes.supervised_losses(trainer.model, part, inner=trainer.model)[0] for part in parts]
        loss = torch.cat(losses).mean()
        gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
        found[name] = Step(loss.item(), gradients, (), ())
    alone = found["alone"]
    return compared(found["together"], alone.loss, {name: one.double() for name, one in alone.gradients.items()})


def _padded(pad: int, batch: dict[str, Any]) -> dict[str, Any]:
    """Put padding behind every row but the longest."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.split(batch[name], batch["lengths"].tolist()) for name in ("input_ids", "labels")]
    ids, labels = (
        pad_sequence(list(one), batch_first=True, padding_value=value)
        for one, value in zip(rows, (pad, IGNORE_INDEX), strict=True)
    )
    lengths = batch["lengths"].new_full((len(ids),), ids.shape[1])
    return {**batch, "input_ids": ids.flatten(), "labels": labels.flatten(), "lengths": lengths}


def loss(bed: Bed) -> Figures:
    """Compare the step with the float64 reference: the mean over the supervised tokens of all its rows."""
    from pytest_mistral_lora.training.adapter import adapter_tensors

    truth = reference(bed.base, adapter_tensors(bed.model()), SCALE, bed.encoded[:ROWS])
    return {**compared(bed.whole, truth.loss, truth.gradients), "supervised": truth.tokens}


def predicting(bed: Bed) -> Figures:
    """Compare the tokens whose successor the loss looks at with those that a supervised token follows."""
    rows = bed.encoded[:ROWS]
    wanted = Counter(row.input_ids[place - 1] for row in rows for place, _ in supervised(row))
    found = Counter(bed.whole.predicting)
    return {"extra": sorted((found - wanted).elements()), "lacking": sorted((wanted - found).elements())}


def checkpointing(bed: Bed) -> Figures:
    """Compare a step that computes its activations twice with the step as it is."""
    return _against_whole(bed, bed.step(activation_checkpointing=True))


def cache(bed: Bed) -> Figures:
    """Count the passes that make a key-value cache, in training and in the held-out loss."""
    calls = bed.step(held_out=2).calls
    figures = {}
    for name, training in (("training", True), ("held-out loss", False)):
        chosen = [call for call in calls if call.training is training]
        figures[name] = {"passes": len(chosen), "with_cache": sum(call.cache for call in chosen)}
    return figures


def _accumulation(figures: Figures, device: str) -> Iterator[Finding]:
    yield from differences("ML309", "4 micro-batches of a row", figures, device, "those of one batch of 4 rows")


def _neighbours(figures: Figures, device: str) -> Iterator[Finding]:
    for name, one in figures.items():
        yield from differences("ML310", name, one, device, "the same, whatever stands beside a row")


def _loss(figures: Figures, device: str) -> Iterator[Finding]:
    expected = f"the mean over {figures['supervised']} supervised tokens, as in float64"
    yield from differences("ML311", f"a step of {ROWS} rows", figures, device, expected)


def _predicting(figures: Figures, device: str) -> Iterator[Finding]:
    if figures["extra"]:
        found = f"a gradient after {len(figures['extra'])} tokens more, first after id {figures['extra'][0]}"
        yield Finding("ML306", found, "", "none where the next label is -100")
    if figures["lacking"]:
        found = f"no gradient after {len(figures['lacking'])} tokens, first after id {figures['lacking'][0]}"
        yield Finding("ML306", found, "", "one where the next token is supervised")


def _checkpointing(figures: Figures, device: str) -> Iterator[Finding]:
    yield from differences("ML315", "with activation checkpointing", figures, device, "those without it")


def _cache(figures: Figures, device: str) -> Iterator[Finding]:
    for name, one in figures.items():
        if one["with_cache"] or not one["passes"]:
            found = f"{one['with_cache']} of {one['passes']} passes make a key-value cache"
            yield Finding("ML312", found, name, "none, in at least one pass")


LAWS = (
    Law("no-gradient-without-label", "ML306", predicting, _predicting),
    Law("micro-batches-split-the-sum", "ML309", accumulation, _accumulation),
    Law("neighbours-change-nothing", "ML310", neighbours, _neighbours),
    Law("loss-is-the-mean-of-its-tokens", "ML311", loss, _loss),
    Law("no-cache-in-training", "ML312", cache, _cache),
    Law("checkpointing-keeps-gradients", "ML315", checkpointing, _checkpointing),
)
