"""Laws of the model: its layers, precision and window; rows packed or alone; its answers; base and adapter merged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import SCALE, TOLERANCE, Figures, TrainerHarness, TrainingLaw
from pytest_mistral_lora.conformance.train.run_laws import refusal_text
from pytest_mistral_lora.conformance.train.step_laws import merge_by_hand, supervised_positions

if TYPE_CHECKING:
    import torch

_TYPO = ("q_proj", "kproj", "v_proj")
# PEFT's default for Mistral, q_proj and v_proj, is neither of them.
_ASKED = (("k_proj", "o_proj"), ("q_proj", "up_proj", "down_proj"))
_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_WINDOW = 4
# Of the largest logit, in float32; 3e-6 was measured.
_MERGED_TOLERANCE = 5e-5
_NEW_TOKENS = 16


def _changed_base(harness: TrainerHarness, name: str, **config: Any) -> Path:
    """Make a checkpoint in `scratch` with changes to the base's `config.json`, and no weights yet."""
    folder = harness.scratch / name
    folder.mkdir(exist_ok=True)
    data = json.loads((harness.base / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**data, **config}), encoding="utf-8")
    return folder


def measure_targets(harness: TrainerHarness) -> Figures:
    """Ask for adapters on some layers, and on a layer whose name is misspelt."""
    adapted = []
    for asked in _ASKED:
        model = harness.new_model(harness.recipe(lora={"target_modules": list(asked)}))
        found = [name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")]
        adapted.append({"asked": asked, "found": {name: found.count(name) for name in sorted(set(found))}})
    return {
        "layers": model.config.num_hidden_layers,
        "adapted": adapted,
        "typo": refusal_text(lambda: harness.new_model(harness.recipe(lora={"target_modules": list(_TYPO)}))),
    }


def _judge_targets(figures: Figures, device: str) -> Iterator[Finding]:
    for adapted in figures["adapted"]:
        expected = dict.fromkeys(sorted(adapted["asked"]), figures["layers"])
        if adapted["found"] != expected:
            yield Finding("ML319", f"adapters are on {adapted['found']}", "lora.target_modules", f"on {expected}")
    if "kproj" not in figures["typo"]:
        found = f"{list(_TYPO)} is not refused for 'kproj'" + (f": {figures['typo']}" if figures["typo"] else "")
        yield Finding("ML319", found, "lora.target_modules", "an error that names it")


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
        for asked in _DTYPES:
            parameters = list(harness.new_model(harness.recipe(precision=asked), base).parameters())
            dtypes = {True: set[str](), False: set[str]()}
            for tensor in parameters:
                dtypes[tensor.requires_grad].add(str(tensor.dtype))
            figures[f"{asked} from {stored}"] = {"base": sorted(dtypes[False]), "trainable": sorted(dtypes[True])}
    return figures


def _judge_precision(figures: Figures, device: str) -> Iterator[Finding]:
    for name, dtypes in figures.items():
        asked = f"torch.{_DTYPES[name.partition(' ')[0]]}"
        if dtypes["base"] != [asked]:
            yield Finding("ML321", f"the base is in {', '.join(dtypes['base'])}", f"precision {name}", asked)
        if dtypes["trainable"] != ["torch.float32"]:
            found = f"trainable parameters are in {', '.join(dtypes['trainable']) or 'no dtype: there are none'}"
            yield Finding("ML321", found, f"precision {name}", "torch.float32")


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


def _row_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits after each token of one row, `(length, vocabulary)` float32."""
    import torch

    logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    return logits


def measure_packing(harness: TrainerHarness) -> Figures:
    """Compare logits and losses of packed rows with those of each row alone, as transformers and the trainer pack."""
    import torch

    from pytest_mistral_lora.training.step.forward import attend_in_segments, segment_arguments
    from pytest_mistral_lora.training.step.packing import Segment

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
            alone = [_row_logits(model, row.input_ids) for row in rows]
        losses = []
        for logits in (packed.split(lengths), alone):
            tokens = []
            for one, row in zip(logits, rows, strict=True):
                tokens += [-one[place - 1].log_softmax(-1)[token].item() for place, token in supervised_positions(row)]
            losses.append(sum(tokens) / len(tokens))
        apart = float((packed - torch.cat(alone)).abs().max() / packed.abs().max())
        figures[attention] = {"logits": apart, "loss": losses[0], "loss_alone": losses[1]}
    return figures


def _judge_packing(figures: Figures, device: str) -> Iterator[Finding]:
    for attention, one in figures.items():
        apart = abs(one["loss"] - one["loss_alone"])
        if one["logits"] > TOLERANCE[device] or apart > TOLERANCE[device] * one["loss_alone"]:
            found = f"packed rows see one another: logits {one['logits']:.2g} apart, relatively; loss {one['loss']:.4f}"
            expected = f"those of each row alone, loss {one['loss_alone']:.4f}"
            yield Finding("ML313", found, f"attention {attention}", expected)


def measure_window(harness: TrainerHarness) -> Figures:
    """Load the base as it is, with a window of four tokens and with none; compare logits within it and beyond."""
    import torch

    from pytest_mistral_lora.checkpoint.base_model import load_base, read_config

    folders = {"as it is": harness.base}
    for name, tokens in ((str(_WINDOW), _WINDOW), ("none", None)):
        folders[name] = _changed_base(harness, f"window-{tokens}", sliding_window=tokens)
        os.link(harness.base / "model.safetensors", folders[name] / "model.safetensors")
    models = {name: load_base(folder, "fp32", "cpu") for name, folder in folders.items()}
    ids = torch.tensor([max(harness.encoded, key=lambda row: len(row.input_ids)).input_ids])
    with torch.inference_mode():
        narrow, wide = (models[name](input_ids=ids).logits[0] for name in (str(_WINDOW), "none"))
    # position i sees positions i - 3 to i: the first four logits cannot tell the windows apart, the later ones must
    apart = (narrow - wide).abs().amax(dim=-1)
    return {
        "windows": {
            name: [read_config(folder).get("sliding_window"), models[name].config.sliding_window]
            for name, folder in folders.items()
        },
        "within": float(apart[:_WINDOW].max()),
        "beyond": float(apart[_WINDOW:].max()),
    }


def _judge_window(figures: Figures, device: str) -> Iterator[Finding]:
    for name, (configured, loaded) in figures["windows"].items():
        if configured != loaded:
            place = f"config.json, sliding_window ({name})"
            yield Finding("ML323", f"the loaded model's window is {loaded}", place, str(configured))
    if figures["within"] > TOLERANCE[device] or not figures["beyond"] > 10 * TOLERANCE[device]:
        found = f"logits change by {figures['within']:.2g} within and by {figures['beyond']:.2g} beyond"
        yield Finding("ML323", found, f"a window of {_WINDOW} tokens", "nothing within, something beyond")


def measure_generation(harness: TrainerHarness) -> Figures:
    """Generate an answer to each row; with a greedy search by hand; and in batches padded on either side."""
    import torch
    from transformers import GenerationConfig

    from pytest_mistral_lora.chat.rows import read_rows
    from pytest_mistral_lora.training.generate import generate, load_adapted

    model = load_adapted(harness.adapter, harness.base, "fp32", "cpu")
    rows, eos = list(read_rows(harness.rows)), harness.encoder.eos_id
    answers = [list(one.ids) for one in generate(model, harness.encoder, rows, max_new_tokens=_NEW_TOKENS)]
    prompts = [list(harness.encoder.prompt(row)) for row in rows]
    by_hand = []
    with torch.inference_mode():
        for prompt in prompts:
            # without a cache, a mask, or transformers' own loop
            ids = prompt.copy()
            while len(ids) < len(prompt) + _NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != eos):
                ids.append(int(_row_logits(model, ids)[-1].argmax()))
            by_hand.append(ids[len(prompt) :])
    figures: dict[str, Any] = {"generated": answers, "by_hand": by_hand}
    length = max(map(len, prompts))
    config = GenerationConfig(do_sample=False, max_new_tokens=_NEW_TOKENS, eos_token_id=eos, pad_token_id=0)
    for side in ("left", "right"):
        ids_and_mask = []
        for columns in (prompts, [[1] * len(prompt) for prompt in prompts]):
            pads = [[0] * (length - len(column)) for column in columns]
            pairs = zip(pads, columns, strict=True)
            ids_and_mask.append(torch.tensor([pad + own if side == "left" else own + pad for pad, own in pairs]))
        with torch.inference_mode():
            output = model.generate(ids_and_mask[0], attention_mask=ids_and_mask[1], generation_config=config)
        rows_of_ids = output[:, length:].tolist()
        figures[side] = [row[: row.index(eos) + 1] if eos in row else row for row in rows_of_ids]
    return figures


def _judge_generation(figures: Figures, device: str) -> Iterator[Finding]:
    for name, expected in (("by_hand", "a greedy search by hand"), ("left", "a batch that is padded on the left")):
        for index, (one, other) in enumerate(zip(figures["generated"], figures[name], strict=True)):
            if one != other:
                yield Finding("ML324", f"generated {one}", f"row {index + 1}", f"{other}, as {expected} does")
    # padding on the right must do harm here, or these rows would not show it in a trainer
    if figures["right"] == figures["left"]:
        yield Finding("ML324", "padding on the right goes unseen", "", "completions that show it")


def merged_model(adapter: Path, base: Path) -> Any:
    """Return base and adapter merged into one plain model, in float32 on the CPU."""
    from pytest_mistral_lora.training.generate import load_adapted

    return load_adapted(adapter, base, "fp32", "cpu").merge_and_unload(safe_merge=True)


def measure_merging(harness: TrainerHarness) -> Figures:
    """Compare the merged model with base and adapter.

    Returns:
        `apart`: largest difference of a logit, relative to the largest one; `other_choices`: number of supervised
        positions with another greedy id; `strength`: how many times the update is in the weights, 1 if merged once.
    """
    import torch
    from safetensors.torch import load_file

    from pytest_mistral_lora.training.generate import load_adapted

    whole = load_adapted(harness.adapter, harness.base, "fp32", "cpu")
    merged = merged_model(harness.adapter, harness.base).eval()
    apart, largest, choices = 0.0, 0.0, 0
    with torch.inference_mode():
        for row in harness.encoded:
            expected, found = (_row_logits(model, row.input_ids) for model in (whole, merged))
            apart = max(apart, float((found - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
            places = [place - 1 for place, _ in supervised_positions(row)]
            choices += int((found.argmax(-1) != expected.argmax(-1))[places].sum())
    base = {name: tensor.double() for name, tensor in load_file(harness.base / "model.safetensors").items()}
    weights = {name: tensor.double() for name, tensor in merged.state_dict().items()}
    # least squares over all adapted weights: with U = scale * B @ A, strength = <W' - W, U> / <U, U>
    along, square = 0.0, 0.0
    for name, wanted in merge_by_hand(base, load_file(harness.adapter / "adapter_model.safetensors"), SCALE).items():
        update = wanted - base[name]
        along += float(((weights[name] - base[name]) * update).sum())
        square += float((update * update).sum())
    return {"apart": apart / largest, "other_choices": choices, "strength": along / square}


def _judge_merging(figures: Figures, device: str) -> Iterator[Finding]:
    if figures["apart"] > _MERGED_TOLERANCE or figures["other_choices"]:
        found = f"logits are {figures['apart']:.2g} apart, relatively; {figures['other_choices']} greedy ids differ"
        yield Finding("ML325", found, "the merged model", f"at most {_MERGED_TOLERANCE} apart, and the same ids")
    if abs(figures["strength"] - 1) > 1e-3:
        found = f"the adapter is merged {figures['strength']:.3f} times"
        yield Finding("ML325", found, "the merged model", "once, scaled by alpha / r")


MODEL_LAWS = (
    TrainingLaw("targets-are-those-asked-for", "ML319", measure_targets, _judge_targets),
    TrainingLaw("precision-is-the-recipes", "ML321", measure_precision, _judge_precision),
    TrainingLaw("packed-as-unpacked", "ML313", measure_packing, _judge_packing),
    TrainingLaw("window-is-the-checkpoints", "ML323", measure_window, _judge_window),
    TrainingLaw("generates-as-by-hand", "ML324", measure_generation, _judge_generation, needs_adapter=True),
    TrainingLaw("merged-as-adapter", "ML325", measure_merging, _judge_merging, needs_adapter=True),
)
