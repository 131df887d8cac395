"""Laws of what goes into a run: whole rows, and the layers and the precision that were asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.conformance.train.bed import Bed
from pytest_mistral_lora.conformance.train.law import Figures, Law

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

    from pytest_mistral_lora.checkpoint.base import load_base
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


LAWS = (
    Law("rows-are-whole-or-refused", "ML314", lengths, _lengths),
    Law("targets-are-those-asked-for", "ML319", targets, _targets),
    Law("frozen-adapter-is-refused", "ML320", frozen, _frozen, of_adapter=True),
    Law("precision-is-the-recipes", "ML321", precision, _precision),
)
