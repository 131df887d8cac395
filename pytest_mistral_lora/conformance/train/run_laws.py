"""Laws of a whole run: its rows, its seeds, a resumed run, numbers that are not finite, a frozen adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import (
    DecoderCall,
    Figures,
    TrainerHarness,
    TrainingLaw,
    record_decoder_calls,
)
from pytest_mistral_lora.places import NOWHERE, Place

if TYPE_CHECKING:
    import torch

    from pytest_mistral_lora.training.run import RunResult


SEED_TOLERANCE = 1e-3
"""Largest difference between the adapters of equal runs on CUDA, whose kernels sum in no fixed order; on a CPU, 0."""

# Five steps, nine rows: it ends within the second epoch of five rows, where a resumed run can lose its place.
_SHORT: dict[str, Any] = {
    "steps": 5,
    "batch_size": 2,
    "micro_batch_tokens": 1,
    "checkpoint_steps": 2,
    "logging_steps": 5,
}
# Without dropout, a resumed run would not need the random state of its checkpoint.
_DROPOUT = {"dropout": 0.1}
# A forward pass of the fifth step: the step after a checkpoint, within the second epoch.
_STOPPED_AT = 8


def refusal_text(act: Callable[[], Any]) -> str:
    """Return the message of the package's error that an act raises; empty without an error."""
    from pytest_mistral_lora.errors import MistralLoraError

    try:
        act()
    except MistralLoraError as error:
        return str(error)
    return ""


def measure_lengths(harness: TrainerHarness) -> Figures:
    """Load the rows with limits on either side of the longest one, and a row without a supervised token."""
    from pytest_mistral_lora.training.rows.loading import load_data

    longest = max(len(row.input_ids) for row in harness.encoded)
    wanted = [[row.input_ids, row.labels] for row in harness.encoded]
    changed = []
    # the limit itself is allowed: an off-by-one error shows here
    for limit in (longest, 10 * longest):
        loaded = load_data(harness.recipe(max_length=limit), harness.encoder).train.encoded
        changed += [limit] if [[row.input_ids, row.labels] for row in loaded] != wanted else []
    recipe, file = harness.recipe(), harness.scratch / "unlabelled.jsonl"
    answer = {"role": "assistant", "content": "No.", "weight": 0}
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Is it?"}, answer]}) + "\n")
    data = recipe.data.model_copy(update={"train": (file,)})
    unlabelled = recipe.model_copy(update={"data": data})
    return {
        "longest": longest,
        "changed_at": changed,
        "row": 1 + next(index for index, row in enumerate(harness.encoded) if len(row.input_ids) == longest),
        "too_long": refusal_text(lambda: load_data(harness.recipe(max_length=longest - 1), harness.encoder)),
        "unlabelled": refusal_text(lambda: load_data(unlabelled, harness.encoder)),
    }


def _judge_lengths(figures: Figures, device: str) -> Iterator[Finding]:
    longest = figures["longest"]
    for limit in figures["changed_at"]:
        found = "a limit that every row keeps changes a row"
        yield Finding("ML314", found, NOWHERE.within("training", f"max_length = {limit}"), "the rows as they are")
    if f"rows.jsonl:{figures['row']}" not in figures["too_long"]:
        found = f"a row of {longest} tokens is not refused by its line: {figures['too_long'] or 'it is taken'}"
        yield Finding(
            "ML314",
            found,
            NOWHERE.within("training", f"max_length = {longest - 1}"),
            f"an error for row {figures['row']}",
        )
    if "unlabelled.jsonl:1" not in figures["unlabelled"]:
        found = f"a row without a label is not refused by its line: {figures['unlabelled'] or 'it is taken'}"
        yield Finding("ML314", found, Place.of("unlabelled.jsonl", 1), "an error for row 1")


def measure_frozen(harness: TrainerHarness) -> Figures:
    """Give the trainer an adapter as PEFT loads one by default: for inference, with no trainable parameter."""
    from peft import PeftModel

    from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
    from pytest_mistral_lora.checkpoint.base_model import load_base
    from pytest_mistral_lora.training.adapter import adapter_tensors, peft_quiet
    from pytest_mistral_lora.training.devices import on_gpu

    recipe = harness.recipe()
    with peft_quiet():
        base = load_base(BaseFolder(harness.base), "fp32", "cuda" if on_gpu(recipe.training) else "cpu")
        model = PeftModel.from_pretrained(base, harness.adapter)
    before = adapter_tensors(model)
    refused = refusal_text(lambda: harness.trainer(model, recipe).train())
    after = adapter_tensors(model)
    moved = sum(not after[name].equal(before[name]) for name in before)
    return {"refused": refused, "tensors": len(before), "moved": moved}


def _judge_frozen(figures: Figures, device: str) -> Iterator[Finding]:
    if not figures["refused"] and figures["moved"] < figures["tensors"]:
        found = f"a run in which {figures['moved']} of {figures['tensors']} tensors move ends well"
        yield Finding(
            "ML320", found, Place.of("an adapter that is loaded frozen"), "an error, or that all of them move"
        )


def _train_short(
    harness: TrainerHarness, name: str, *, resume: bool = False, **training: Any
) -> tuple[RunResult, list[DecoderCall]]:
    """Train for five steps; return the run and its forward passes in training mode."""
    from pytest_mistral_lora.training.run import train

    # calls in evaluation mode, such as those of the probe, are not part of the order of the rows
    with record_decoder_calls() as calls:
        result = train(harness.recipe(name, lora=_DROPOUT, **_SHORT, **training), resume=resume, unjudged=True)
    return result, [call for call in calls if call.training]


class _Interruption(Exception):
    """Ends a run from within, as a kill would."""


def _train_and_interrupt(harness: TrainerHarness, name: str) -> list[DecoderCall]:
    """Start a short run and end it at a forward pass; return its passes."""
    from pytest_mistral_lora.training.run import train

    def interrupt(passes: list[DecoderCall], output: Any) -> None:
        if len(passes) == _STOPPED_AT:
            raise _Interruption

    with record_decoder_calls(interrupt) as calls:
        try:
            train(harness.recipe(name, lora=_DROPOUT, **_SHORT), unjudged=True)
        except _Interruption:
            return calls
    raise RuntimeError(f"the run ended after {len(calls)} passes, before it could be broken off")


def measure_seeds(harness: TrainerHarness) -> Figures:
    """Make a short run twice with one seed, with another seed, with another order seed only, and resumed.

    Returns:
        By run: SHA-256 of the adapter's first values (`initial`), of the input ids in the order of the model's passes
        (`order`), of the adapter file (`adapter`); and the largest absolute difference from the first run's adapter
        (`farthest`). For `resumed`, also the numbers of its forward passes before and after.
    """
    import torch

    from pytest_mistral_lora.checkpoint.hashes import sha256_file
    from pytest_mistral_lora.records.files import sha256_ids
    from pytest_mistral_lora.records.tensors import sha256_tensors

    first: dict[str, torch.Tensor] = {}

    def described(result: RunResult, calls: list[DecoderCall]) -> dict[str, Any]:
        if not first:
            first.update(result.adapter.tensors)
        apart = [float((tensor - first[name]).abs().max()) for name, tensor in result.adapter.tensors.items()]
        return {
            "initial": sha256_tensors(result.adapter.initial),
            "order": sha256_ids(call.ids for call in calls),
            "adapter": sha256_file(result.output / "adapter_model.safetensors"),
            "farthest": max(apart),
        }

    runs: dict[str, Any] = {}
    settings: dict[str, Any] = {"first": {}, "again": {}, "other": {"seed": 1}, "reordered": {"order_seed": 1}}
    for name, training in settings.items():
        torch.rand(17)  # the initial random state of a process must not matter
        runs[name] = described(*_train_short(harness, f"seed-{name}", **training))
    before = _train_and_interrupt(harness, "seed-resumed")
    result, after = _train_short(harness, "seed-resumed", resume=True)
    return {**runs, "resumed": {**described(result, after), "passes": [len(before), len(after)]}}


def _is_same_adapter(run: dict[str, Any], other: dict[str, Any], device: str) -> bool:
    if device == "cpu":
        return bool(run["adapter"] == other["adapter"])
    return bool(run["farthest"] <= SEED_TOLERANCE)


def _judge_seed(figures: Figures, device: str) -> Iterator[Finding]:
    first, again = figures["first"], figures["again"]
    if not _is_same_adapter(again, first, device):
        found = f"two runs with the same seed give adapters that are up to {again['farthest']:.3g} apart"
        yield Finding("ML307", found, NOWHERE, "the same bytes" if device == "cpu" else f"{SEED_TOLERANCE}")
    if first["adapter"] == figures["other"]["adapter"]:
        yield Finding(
            "ML307", "another seed gives the same adapter", NOWHERE.within("training", "seed"), "another adapter"
        )


def _judge_first_values(figures: Figures, device: str) -> Iterator[Finding]:
    first = figures["first"]["initial"]
    if figures["again"]["initial"] != first:
        yield Finding("ML307", "the same seed gives other first values", NOWHERE.within("training", "seed"), "the same")
    if figures["other"]["initial"] == first:
        yield Finding("ML307", "another seed gives the same first values", NOWHERE.within("training", "seed"), "others")
    if figures["reordered"]["initial"] != first:
        yield Finding(
            "ML307",
            "the seed of the order changes the first values",
            NOWHERE.within("training", "order_seed"),
            "the same",
        )


def _judge_order(figures: Figures, device: str) -> Iterator[Finding]:
    first = figures["first"]["order"]
    if figures["again"]["order"] != first:
        yield Finding(
            "ML307", "the same seed gives another order of the rows", NOWHERE.within("training", "seed"), "the same"
        )
    for name, place in (
        ("other", NOWHERE.within("training", "seed")),
        ("reordered", NOWHERE.within("training", "order_seed")),
    ):
        if figures[name]["order"] == first:
            yield Finding("ML307", "another seed gives the same order of the rows", place, "another")


def _judge_resumed(figures: Figures, device: str) -> Iterator[Finding]:
    resumed, first = figures["resumed"], figures["first"]
    if not _is_same_adapter(resumed, first, device):
        passes = " and ".join(map(str, resumed["passes"]))
        found = f"broken off and resumed ({passes} passes), the adapter is up to {resumed['farthest']:.3g} apart"
        yield Finding("ML318", found, NOWHERE, "that of a run that was never broken off")


def measure_finite(harness: TrainerHarness) -> Figures:
    """Train with an infinity in the first pass, forward or backward, then in bfloat16 without an infinity.

    Returns:
        `stops`: by the kind of infinity, the error that stopped the run, and whether it saved anything;
        `bf16_is_finite`: whether every logged loss and adapter tensor of the bfloat16 run is finite.
    """
    import torch

    from pytest_mistral_lora.training.run import train
    from pytest_mistral_lora.training.run_folder import work_folder

    stops = {}
    for name in ("activation", "gradient"):
        recipe = harness.recipe(f"infinite-{name}", **_SHORT)

        def inject_once(passes: list[DecoderCall], output: Any, name: str = name) -> None:
            if len(passes) == 1 and name == "activation":
                output.last_hidden_state = output.last_hidden_state * float("inf")
            elif len(passes) == 1:
                # the loss stays finite: only a check of the gradients detects this infinity
                output.last_hidden_state.register_hook(lambda gradient: gradient * float("inf"))

        with record_decoder_calls(inject_once):
            stopped = refusal_text(partial(train, recipe))
        saved = recipe.output.exists() or any(work_folder(recipe).glob("checkpoint-*"))
        stops[name] = {"stopped": stopped, "saved": saved}
    result, _ = _train_short(harness, "bf16", precision="bf16")
    losses = [line["loss"] for line in result.log if "loss" in line]
    tensors = [*result.adapter.tensors.values(), torch.tensor(losses)]
    return {"stops": stops, "bf16_is_finite": all(bool(torch.isfinite(tensor).all()) for tensor in tensors)}


def _judge_finite(figures: Figures, device: str) -> Iterator[Finding]:
    for name, run in figures["stops"].items():
        if not run["stopped"]:
            yield Finding("ML322", f"an infinite {name} does not stop the run", NOWHERE, "an error")
        if run["saved"]:
            yield Finding("ML322", f"after an infinite {name}, something is saved", NOWHERE, "nothing")
    if not figures["bf16_is_finite"]:
        yield Finding("ML322", "a loss or a tensor is not finite in bfloat16", NOWHERE, "finite numbers")


RUN_LAWS = (
    TrainingLaw("ML307.adapter", measure_seeds, _judge_seed),
    TrainingLaw("ML307.values", measure_seeds, _judge_first_values),
    TrainingLaw("ML307.order", measure_seeds, _judge_order),
    TrainingLaw("ML318", measure_seeds, _judge_resumed),
    TrainingLaw("ML322", measure_finite, _judge_finite),
    TrainingLaw("ML314", measure_lengths, _judge_lengths),
    TrainingLaw("ML320", measure_frozen, _judge_frozen, needs_adapter=True),
)
