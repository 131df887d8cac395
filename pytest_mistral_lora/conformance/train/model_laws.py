"""Laws of the model: its layers, precision and window; packed and single rows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.model_facts import ModelFacts
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import Figures, TrainerHarness, TrainingLaw
from pytest_mistral_lora.conformance.train.run_laws import refusal_text
from pytest_mistral_lora.conformance.train.step_laws import TOLERANCE, supervised_positions
from pytest_mistral_lora.places import NOWHERE, Place

if TYPE_CHECKING:
    import torch

_TYPO = "kproj"
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_WINDOW = 4
_WIDE = 4096


def _changed_base(harness: TrainerHarness, name: str, *, text: Mapping[str, Any] | None = None, **config: Any) -> Path:
    """Make a checkpoint in `scratch` with changes to the base's `config.json`, and no weights yet.

    Args:
        harness: The harness.
        name: Name of the folder.
        text: Changes to the part that describes the text model.
        config: Changes at the top level.
    """
    folder = harness.scratch / name
    folder.mkdir(exist_ok=True)
    data = json.loads((harness.base / "config.json").read_text(encoding="utf-8"))
    facts = ModelFacts(data)
    part = {**facts.text, **(text or {})}
    changed = {**({**data, "text_config": part} if facts.is_wrapped else part), **config}
    (folder / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    return folder


def measure_targets(harness: TrainerHarness) -> Figures:
    """Request adapters on some layers, and on a layer with a misspelt name."""
    adapted, text = [], BaseFolder(harness.base).architecture.text
    # PEFT's default for Mistral, q_proj and v_proj, equals neither list
    for target_modules in ((text.attention[1], text.attention[-1]), (text.attention[0], *text.mlp[1:])):
        model = harness.new_model(harness.recipe(lora={"target_modules": list(target_modules)}))
        found = [name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")]
        adapted.append({"asked": target_modules, "found": {name: found.count(name) for name in sorted(set(found))}})
    misspelt = [text.attention[0], _TYPO, text.attention[-1]]
    return {
        "layers": model.config.get_text_config().num_hidden_layers,
        "adapted": adapted,
        "typo": refusal_text(lambda: harness.new_model(harness.recipe(lora={"target_modules": misspelt}))),
        "misspelt": misspelt,
    }


def _judge_targets(figures: Figures, device: str) -> Iterator[Finding]:
    for adapted in figures["adapted"]:
        expected = dict.fromkeys(sorted(adapted["asked"]), figures["layers"])
        if adapted["found"] != expected:
            yield Finding(
                "ML319",
                f"adapters are on {adapted['found']}",
                NOWHERE.within("lora", "target_modules"),
                f"on {expected}",
            )
    if _TYPO not in figures["typo"]:
        said = f": {figures['typo']}" if figures["typo"] else ""
        found = f"{figures['misspelt']} is not refused for {_TYPO!r}{said}"
        yield Finding("ML319", found, NOWHERE.within("lora", "target_modules"), "an error that names it")


def measure_precision(harness: TrainerHarness) -> Figures:
    """Load checkpoints stored in float32 and bfloat16 in either precision, and list the dtypes of the parameters."""
    import torch
    from safetensors.torch import load_file, save_file

    # most published checkpoints are stored in bfloat16, and transformers 5 loads a checkpoint in its own precision
    stored_as_bf16 = _changed_base(harness, "bf16-base", dtype="bfloat16")
    tensors = {
        name: tensor.to(torch.bfloat16) for name, tensor in load_file(harness.base / "model.safetensors").items()
    }
    save_file(tensors, stored_as_bf16 / "model.safetensors", metadata={"format": "pt"})
    figures = {}
    for stored, base in (("fp32", harness.base), ("bf16", stored_as_bf16)):
        for precision in _DTYPES:
            parameters = list(harness.new_model(harness.recipe(precision=precision), base).parameters())
            dtypes = {True: set[str](), False: set[str]()}
            for tensor in parameters:
                dtypes[tensor.requires_grad].add(str(tensor.dtype))
            figures[f"{precision} from {stored}"] = {"base": sorted(dtypes[False]), "trainable": sorted(dtypes[True])}
    return figures


def _judge_precision(figures: Figures, device: str) -> Iterator[Finding]:
    for name, dtypes in figures.items():
        dtype = f"torch.{_DTYPES[name.partition(' ')[0]]}"
        if dtypes["base"] != [dtype]:
            yield Finding("ML321", f"the base is in {', '.join(dtypes['base'])}", NOWHERE / f"precision {name}", dtype)
        if dtypes["trainable"] != ["torch.float32"]:
            found = f"trainable parameters are in {', '.join(dtypes['trainable']) or 'no dtype: there are none'}"
            yield Finding("ML321", found, NOWHERE / f"precision {name}", "torch.float32")


def packed_call(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Return a model's arguments for packed rows that do not see one another.

    transformers isolates rows by `position_ids` that restart, but only if the call has neither a mask nor a cache.

    Returns:
        `input_ids` and `position_ids`, `(1, tokens of all rows)` int64; `attention_mask` None; `use_cache` False.
    """
    import torch

    ids = torch.tensor([[token for row in rows for token in row.input_ids]])
    places = torch.tensor([[place for row in rows for place in range(len(row.input_ids))]])
    return {"input_ids": ids, "position_ids": places, "attention_mask": None, "use_cache": False}


def row_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits after each token of one row, `(length, vocabulary)` float32."""
    import torch

    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    return logits


def measure_packing(harness: TrainerHarness) -> Figures:
    """Compare logits and losses of packed rows with those of single rows, packed by transformers and by the trainer."""
    import torch

    from pytest_mistral_lora.training.step import Segment
    from pytest_mistral_lora.training.step.forward import attend_in_segments, segment_arguments

    rows, model, figures = harness.encoded, harness.perturbed_model().eval(), {}
    lengths = [len(row.input_ids) for row in rows]
    for attention in ("sdpa", "eager", "the trainer's"):
        call = packed_call(rows)
        if attention == "the trainer's":
            attend_in_segments(model.get_base_model())
            ends = accumulate(lengths)
            call |= segment_arguments([Segment(end - length, end) for length, end in zip(lengths, ends, strict=True)])
        else:
            model.get_base_model().set_attn_implementation(attention)
        call = {name: value.to(model.device) if hasattr(value, "to") else value for name, value in call.items()}
        with torch.inference_mode():
            packed = model(**call).logits[0].float()
            alone = [row_logits(model, row.input_ids) for row in rows]
        losses = []
        for logits in (packed.split(lengths), alone):
            tokens = []
            for of_row, row in zip(logits, rows, strict=True):
                tokens += [
                    -of_row[place - 1].log_softmax(-1)[token].item() for place, token in supervised_positions(row)
                ]
            losses.append(sum(tokens) / len(tokens))
        apart = float((packed - torch.cat(alone)).abs().max() / packed.abs().max())
        figures[attention] = {"logits": apart, "loss": losses[0], "loss_alone": losses[1]}
    return figures


def _judge_packing(figures: Figures, device: str) -> Iterator[Finding]:
    for attention, measured in figures.items():
        apart = abs(measured["loss"] - measured["loss_alone"])
        if measured["logits"] > TOLERANCE[device] or apart > TOLERANCE[device] * measured["loss_alone"]:
            found = f"packed rows see one another: logits {measured['logits']:.2g} apart, relatively; "
            found += f"loss {measured['loss']:.4f}"
            expected = f"those of each row alone, loss {measured['loss_alone']:.4f}"
            yield Finding("ML313", found, NOWHERE / f"attention {attention}", expected)


def measure_window(harness: TrainerHarness) -> Figures:
    """Load the base unchanged, with a window of four tokens, and without one; compare logits within and beyond it."""
    import torch

    from pytest_mistral_lora.checkpoint.base_model import load_base

    base = BaseFolder(harness.base)
    if not base.architecture.text.has_window:
        return {"not measured": f"{base.architecture.title} has no sliding window"}
    folders = {"as it is": base}
    # layers that require a window have one: a window that no row fills has no effect
    wide = _WIDE if base.facts.layer_types else None
    for name, tokens in ((str(_WINDOW), _WINDOW), ("none", wide)):
        folder = _changed_base(harness, f"window-{tokens}", text={"sliding_window": tokens})
        os.link(harness.base / "model.safetensors", folder / "model.safetensors")
        folders[name] = BaseFolder(folder)
    models = {name: load_base(folder, "fp32", "cpu") for name, folder in folders.items()}
    ids = torch.tensor([max(harness.encoded, key=lambda row: len(row.input_ids)).input_ids])
    with torch.inference_mode():
        narrow, wide = (models[name](input_ids=ids).logits[0] for name in (str(_WINDOW), "none"))
    # position i sees positions i - 3 to i: the first four logits do not depend on the window, the later ones must
    apart = (narrow - wide).abs().amax(dim=-1)
    configured = {name: folder.facts.window for name, folder in folders.items()}
    return {
        "windows": {
            name: [tokens, models[name].config.get_text_config().sliding_window] for name, tokens in configured.items()
        },
        "within": float(apart[:_WINDOW].max()),
        "beyond": float(apart[_WINDOW:].max()),
    }


def _judge_window(figures: Figures, device: str) -> Iterator[Finding]:
    for name, (configured, loaded) in figures["windows"].items():
        if configured != loaded:
            place = Place.of("config.json") / f"sliding_window ({name})"
            yield Finding("ML321", f"the loaded model's window is {loaded}", place, str(configured))
    if figures["within"] > TOLERANCE[device] or not figures["beyond"] > 10 * TOLERANCE[device]:
        found = f"logits change by {figures['within']:.2g} within and by {figures['beyond']:.2g} beyond"
        yield Finding("ML321", found, NOWHERE / f"a window of {_WINDOW} tokens", "nothing within, something beyond")


MODEL_LAWS = (
    TrainingLaw("ML319", measure_targets, _judge_targets),
    TrainingLaw("ML321.precision", measure_precision, _judge_precision),
    TrainingLaw("ML313", measure_packing, _judge_packing),
    TrainingLaw("ML321.window", measure_window, _judge_window),
)
