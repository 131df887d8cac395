"""Laws of a whole run: what its seed decides, that it goes on as if never stopped, and that it stops where it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.conformance.train.bed import Bed, Call, watched
from pytest_mistral_lora.conformance.train.law import Figures, Law

if TYPE_CHECKING:
    from pytest_mistral_lora.training.run import RunResult

SEED_TOLERANCE = 1e-3
"""How far apart the same run's adapters may be on CUDA, whose kernels sum in no fixed order; on a CPU, not at all."""

_SHORT: dict[str, Any] = {
    "steps": 5,
    "batch_size": 2,
    "micro_batch_tokens": 1,
    "checkpoint_steps": 2,
    "logging_steps": 5,
}
"""A run of nine rows: nearly twice through the data."""

_DROPOUT = {"dropout": 0.1}
_STOPPED_AT = 8
"""The pass at which a run is broken off: in its fifth step, one after a checkpoint, within the second epoch."""


class _Stopped(Exception):
    """Breaks off a run, as a kill would."""


def _short(bed: Bed, name: str, *, resume: bool = False, **training: Any) -> tuple[RunResult, list[Call]]:
    from pytest_mistral_lora.training.run import train

    with watched() as calls:
        result = train(bed.recipe(name, lora=_DROPOUT, **_SHORT, **training), resume=resume)
    return result, [call for call in calls if call.training]


def seeds(bed: Bed) -> Figures:
    """Train for a moment: with the same seed twice, with another, with another for the order only, and resumed.

    Returns:
        By run: hashes of the adapter's first values (`initial`), of the rows in the order in which the model saw them
        (`order`), of the adapter file (`adapter`); and how far the adapter is from the first run's (`farthest`).
    """
    import torch

    runs: dict[str, Any] = {}
    first: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {"first": {}, "again": {}, "other": {"seed": 1}, "reordered": {"order_seed": 1}}
    for name, training in settings.items():
        torch.rand(17)  # whatever a process drew before must not matter
        result, calls = _short(bed, f"seed-{name}", **training)
        first = first or dict(result.adapter.tensors)
        runs[name] = _described(result, calls, first)
    calls = _broken_off(bed, "seed-resumed")
    result, more = _short(bed, "seed-resumed", resume=True)
    return {**runs, "resumed": {**_described(result, more, first), "passes": [len(calls), len(more)]}}


def _described(result: RunResult, calls: list[Call], first: dict[str, Any]) -> dict[str, Any]:
    from pytest_mistral_lora.records.hashing import sha256_file, sha256_ids, sha256_tensors

    apart = [float((tensor - first[name]).abs().max()) for name, tensor in result.adapter.tensors.items()]
    return {
        "initial": sha256_tensors(result.adapter.initial),
        "order": sha256_ids(call.ids for call in calls),
        "adapter": sha256_file(result.output / "adapter_model.safetensors"),
        "farthest": max(apart),
    }


def _broken_off(bed: Bed, name: str) -> list[Call]:
    """Start a run and break it off; return its passes."""
    from pytest_mistral_lora.training.run import train

    def stop(passes: list[Call], output: Any) -> None:
        if len(passes) == _STOPPED_AT:
            raise _Stopped

    with watched(stop) as calls:
        try:
            train(bed.recipe(name, lora=_DROPOUT, **_SHORT))
        except _Stopped:
            return calls
    raise RuntimeError(f"the run ended after {len(calls)} passes, before it could be broken off")


def _same(one: dict[str, Any], other: dict[str, Any], device: str) -> bool:
    if device == "cpu":
        return bool(one["adapter"] == other["adapter"])
    return bool(one["farthest"] <= SEED_TOLERANCE)


def _seed(figures: Figures, device: str) -> Iterator[Finding]:
    first, again = figures["first"], figures["again"]
    if not _same(again, first, device):
        what = f"two runs with the same seed give adapters that are up to {again['farthest']:.3g} apart"
        yield Finding("ML307", what, "", "the same bytes" if device == "cpu" else f"{SEED_TOLERANCE}")
    if first["adapter"] == figures["other"]["adapter"]:
        yield Finding("ML307", "another seed gives the same adapter", "training.seed", "another adapter")


def _initial(figures: Figures, device: str) -> Iterator[Finding]:
    first = figures["first"]["initial"]
    if figures["again"]["initial"] != first:
        yield Finding("ML316", "the same seed gives other first values", "training.seed", "the same")
    if figures["other"]["initial"] == first:
        yield Finding("ML316", "another seed gives the same first values", "training.seed", "others")
    if figures["reordered"]["initial"] != first:
        yield Finding("ML316", "the seed of the order changes the first values", "training.order_seed", "the same")


def _order(figures: Figures, device: str) -> Iterator[Finding]:
    first = figures["first"]["order"]
    if figures["again"]["order"] != first:
        yield Finding("ML317", "the same seed gives another order of the rows", "training.seed", "the same")
    for name, place in (("other", "training.seed"), ("reordered", "training.order_seed")):
        if figures[name]["order"] == first:
            yield Finding("ML317", "another seed gives the same order of the rows", place, "another")


def _resumed(figures: Figures, device: str) -> Iterator[Finding]:
    resumed, first = figures["resumed"], figures["first"]
    if not _same(resumed, first, device):
        passes = " and ".join(map(str, resumed["passes"]))
        found = f"broken off and resumed ({passes} passes), the adapter is up to {resumed['farthest']:.3g} apart"
        yield Finding("ML318", found, "", "that of a run that was never broken off")


def finite(bed: Bed) -> Figures:
    """Train with an infinity put into the activations, and into their gradient; then in bfloat16, with none."""
    import torch

    stops = {name: _injected(bed, name, inject) for name, inject in _INJECTIONS.items()}
    result, _ = _short(bed, "bf16", precision="bf16")
    tensors = result.adapter.tensors.values()
    losses = [line["loss"] for line in result.log if "loss" in line]
    sound = all(bool(torch.isfinite(tensor).all()) for tensor in (*tensors, torch.tensor(losses)))
    return {"stops": stops, "bf16_is_finite": sound}


def _into_activations(output: Any) -> None:
    output.last_hidden_state = output.last_hidden_state * float("inf")


def _into_gradient(output: Any) -> None:
    output.last_hidden_state.register_hook(lambda gradient: gradient * float("inf"))


_INJECTIONS: dict[str, Callable[[Any], None]] = {"activation": _into_activations, "gradient": _into_gradient}


def _injected(bed: Bed, name: str, inject: Callable[[Any], None]) -> dict[str, Any]:
    """Train with one infinity at the first pass; return why the run stopped, and whether anything was saved."""
    from pytest_mistral_lora.errors import MistralLoraError
    from pytest_mistral_lora.training.run import train, work_folder

    recipe = bed.recipe(f"infinite-{name}", **_SHORT)
    stopped = ""
    with watched(lambda passes, output: inject(output) if len(passes) == 1 else None):
        try:
            train(recipe)
        except MistralLoraError as error:
            stopped = str(error)
    saved = recipe.output.exists() or any(work_folder(recipe).glob("checkpoint-*"))
    return {"stopped": stopped, "saved": saved}


def _finite(figures: Figures, device: str) -> Iterator[Finding]:
    for name, one in figures["stops"].items():
        if not one["stopped"]:
            yield Finding("ML322", f"an infinite {name} does not stop the run", "", "an error")
        if one["saved"]:
            yield Finding("ML322", f"after an infinite {name}, something is saved", "", "nothing")
    if not figures["bf16_is_finite"]:
        yield Finding("ML322", "a loss or a tensor is not finite in bfloat16", "", "finite numbers")


LAWS = (
    Law("seed-decides", "ML307", seeds, _seed),
    Law("seed-decides-first-values", "ML316", seeds, _initial),
    Law("seed-decides-order", "ML317", seeds, _order),
    Law("resumed-as-uninterrupted", "ML318", seeds, _resumed),
    Law("not-finite-stops", "ML322", finite, _finite),
)
