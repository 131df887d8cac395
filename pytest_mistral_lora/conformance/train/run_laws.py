"""Laws of what goes into a run: whole rows, and the layers and the precision that were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import Bed, Call, Figures, Law, watched

if TYPE_CHECKING:
    from pytest_mistral_lora.training.finish import RunResult


_TYPO = ("q_proj", "kproj", "v_proj")
_ASKED = (("k_proj", "o_proj"), ("q_proj", "up_proj", "down_proj"))
"""Target modules that no default of PEFT has."""


def _refusal(act: Callable[[], Any]) -> str:
    """Return what an act is refused with, or an empty string if it is not."""
    from pytest_mistral_lora.errors import MistralLoraError

    try:
        act()
    except MistralLoraError as error:
        return str(error)
    return ""


def lengths(bed: Bed) -> Figures:
    """Load the rows with limits on either side of the longest one, and a row in which nothing is trained on."""
    from pytest_mistral_lora.training.rows.loading import load_data

    longest = max(len(row.input_ids) for row in bed.encoded)
    wanted = [[row.input_ids, row.labels] for row in bed.encoded]
    changed = []
    for limit in (longest, 10 * longest):
        loaded = load_data(bed.recipe(max_length=limit), bed.encoder).train.encoded
        changed += [limit] if [[row.input_ids, row.labels] for row in loaded] != wanted else []
    too_long = _refusal(lambda: load_data(bed.recipe(max_length=longest - 1), bed.encoder))
    return {
        "longest": longest,
        "changed_at": changed,
        "row": 1 + next(index for index, row in enumerate(bed.encoded) if len(row.input_ids) == longest),
        "too_long": too_long,
        "unlabelled": _refusal(lambda: _load_unlabelled(bed)),
    }


def _load_unlabelled(bed: Bed) -> Any:
    from pytest_mistral_lora.training.rows.loading import load_data

    file = bed.scratch / "unlabelled.jsonl"
    answer = {"role": "assistant", "content": "No.", "weight": 0}
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "Is it?"}, answer]}) + "\n")
    recipe = bed.recipe()
    return load_data(recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": (file,)})}), bed.encoder)


def _lengths(figures: Figures, device: str) -> Iterator[Finding]:
    longest = figures["longest"]
    for limit in figures["changed_at"]:
        found = "a limit that every row keeps changes a row"
        yield Finding("ML314", found, f"training.max_length = {limit}", "the rows as they are")
    if f"rows.jsonl:{figures['row']}" not in figures["too_long"]:
        found = f"a row of {longest} tokens is not refused by its line: {figures['too_long'] or 'it is taken'}"
        yield Finding("ML314", found, f"training.max_length = {longest - 1}", f"an error for row {figures['row']}")
    if "unlabelled.jsonl:1" not in figures["unlabelled"]:
        found = f"a row without a label is not refused by its line: {figures['unlabelled'] or 'it is taken'}"
        yield Finding("ML314", found, "unlabelled.jsonl:1", "an error for row 1")


def targets(bed: Bed) -> Figures:
    """Ask for adapters on layers, and on one that is misspelt."""
    adapted = []
    for asked in _ASKED:
        model = bed.new_model(bed.recipe(lora={"target_modules": list(asked)}))
        found = [name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")]
        adapted.append({"asked": asked, "found": {name: found.count(name) for name in sorted(set(found))}})
    return {
        "layers": model.config.num_hidden_layers,
        "adapted": adapted,
        "typo": _refusal(lambda: bed.new_model(bed.recipe(lora={"target_modules": list(_TYPO)}))),
    }


def _targets(figures: Figures, device: str) -> Iterator[Finding]:
    for one in figures["adapted"]:
        expected = dict.fromkeys(sorted(one["asked"]), figures["layers"])
        if one["found"] != expected:
            yield Finding("ML319", f"adapters are on {one['found']}", "lora.target_modules", f"on {expected}")
    if "kproj" not in figures["typo"]:
        found = f"{list(_TYPO)} is not refused for 'kproj'" + (f": {figures['typo']}" if figures["typo"] else "")
        yield Finding("ML319", found, "lora.target_modules", "an error that names it")


def frozen(bed: Bed) -> Figures:
    """Give the trainer an adapter as PEFT loads one unless it is told otherwise: frozen."""
    from peft import PeftModel

    from pytest_mistral_lora.checkpoint.base_model import load_base
    from pytest_mistral_lora.training.adapter import adapter_tensors, peft_quiet
    from pytest_mistral_lora.training.devices import on_gpu

    recipe = bed.recipe()
    with peft_quiet():
        base = load_base(bed.base, "fp32", "cuda" if on_gpu(recipe.training) else "cpu")
        model = PeftModel.from_pretrained(base, bed.adapter)
    before = adapter_tensors(model)
    refused = _refusal(lambda: bed.trainer(model, recipe).train())
    after = adapter_tensors(model)
    moved = sum(not after[name].equal(before[name]) for name in before)
    return {"refused": refused, "tensors": len(before), "moved": moved}


def _frozen(figures: Figures, device: str) -> Iterator[Finding]:
    if not figures["refused"] and figures["moved"] < figures["tensors"]:
        found = f"a run in which {figures['moved']} of {figures['tensors']} tensors move ends well"
        yield Finding("ML320", found, "an adapter that is loaded frozen", "an error, or that all of them move")


def precision(bed: Bed) -> Figures:
    """Load checkpoints of either precision in either precision."""
    found = {}
    for stored, base in (("fp32", bed.base), ("bf16", _in_bf16(bed))):
        for asked in ("fp32", "bf16"):
            parameters = list(bed.new_model(bed.recipe(precision=asked), base).parameters())
            found[f"{asked} from {stored}"] = {
                "base": sorted({str(one.dtype) for one in parameters if not one.requires_grad}),
                "trainable": sorted({str(one.dtype) for one in parameters if one.requires_grad}),
            }
    return found


def _in_bf16(bed: Bed) -> Path:
    """Make the same base in bfloat16: most checkpoints of the world are stored so."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = bed.scratch / "bf16-base"
    folder.mkdir(exist_ok=True)
    config = json.loads((bed.base / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    tensors = {name: one.to(torch.bfloat16) for name, one in load_file(bed.base / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_DTYPES = {"fp32": ["torch.float32"], "bf16": ["torch.bfloat16"]}


def _precision(figures: Figures, device: str) -> Iterator[Finding]:
    for name, one in figures.items():
        asked = _DTYPES[name.partition(" ")[0]]
        if one["base"] != asked:
            yield Finding("ML321", f"the base is in {', '.join(one['base'])}", f"precision {name}", asked[0])
        if one["trainable"] != _DTYPES["fp32"]:
            found = f"trainable parameters are in {', '.join(one['trainable']) or 'no dtype: there are none'}"
            yield Finding("ML321", found, f"precision {name}", "torch.float32")


SETUP_LAWS = (
    Law("rows-are-whole-or-refused", "ML314", lengths, _lengths),
    Law("targets-are-those-asked-for", "ML319", targets, _targets),
    Law("frozen-adapter-is-refused", "ML320", frozen, _frozen, of_adapter=True),
    Law("precision-is-the-recipes", "ML321", precision, _precision),
)


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
