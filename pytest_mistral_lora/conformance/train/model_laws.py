"""Laws of the model: packed or alone, within its window or beyond, in a batch or single, merged or not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import SCALE, TOLERANCE, Bed, Figures, Law
from pytest_mistral_lora.conformance.train.step_laws import adapted_weights, supervised

if TYPE_CHECKING:
    import torch

_WINDOW = 4
_MERGED = 5e-5
"""How far merged logits may be from the adapter's in float32, against the largest logit: 3e-6 was seen."""
_NEW_TOKENS = 16


def packed_call(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Return what a model is called with, so that packed rows do not see one another.

    transformers keeps them apart by `position_ids` that restart, and only where there is neither a mask nor a cache.

    Args:
        rows: Encoded rows.

    Returns:
        `input_ids` and `position_ids`, `(1, tokens of all rows)` int64; `attention_mask` None; `use_cache` False.
    """
    import torch

    ids = [token for row in rows for token in row.input_ids]
    places = [place for row in rows for place in range(len(row.input_ids))]
    return {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([places]),
        "attention_mask": None,
        "use_cache": False,
    }


def packing(bed: Bed) -> Figures:
    """Compare logits and losses of packed rows with those of each row alone, as transformers and the trainer pack."""
    import torch

    from pytest_mistral_lora.training.step.attention import attend_in_segments

    rows, model, figures = bed.encoded, bed.model().eval(), {}
    for attention in ("sdpa", "eager", "the trainer's"):
        if attention == "the trainer's":
            attend_in_segments(model.get_base_model())
        else:
            model.get_base_model().set_attn_implementation(attention)
        arguments = packed_call(rows) | (_segments(rows) if attention == "the trainer's" else {})
        call = {name: _on(model, value) for name, value in arguments.items()}
        with torch.inference_mode():
            packed = model(**call).logits[0].float()
            alone = [_logits(model, row.input_ids) for row in rows]
        pieces = packed.split([len(row.input_ids) for row in rows])
        losses = [_loss_of(logits, rows) for logits in (pieces, alone)]
        logits = float((packed - torch.cat(alone)).abs().max() / packed.abs().max())
        figures[attention] = {"logits": logits, "loss": losses[0], "loss_alone": losses[1]}
    return figures


def _segments(rows: Sequence[EncodedRow]) -> dict[str, Any]:
    """Return the arguments by which the trainer keeps rows apart."""
    from pytest_mistral_lora.training.step.attention import segment_arguments
    from pytest_mistral_lora.training.step.packing import Segment

    ends = accumulate(len(row.input_ids) for row in rows)
    return segment_arguments([Segment(end - len(row.input_ids), end) for row, end in zip(rows, ends, strict=True)])


def _on(model: Any, value: Any) -> Any:
    return value.to(model.device) if hasattr(value, "to") else value


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits after each token of one row, `(length, vocabulary)` float32."""
    import torch

    found: torch.Tensor = model(input_ids=_on(model, torch.tensor([ids])), use_cache=False).logits[0].float()
    return found


def _loss_of(logits: Sequence[torch.Tensor], rows: Sequence[EncodedRow]) -> float:
    """Return the mean over the supervised tokens of all rows, in nats."""
    losses = []
    for one, row in zip(logits, rows, strict=True):
        losses += [-one[place - 1].log_softmax(-1)[token].item() for place, token in supervised(row)]
    return float(sum(losses) / len(losses))


def _packing(figures: Figures, device: str) -> Iterator[Finding]:
    for attention, one in figures.items():
        apart = abs(one["loss"] - one["loss_alone"])
        if one["logits"] > TOLERANCE[device] or apart > TOLERANCE[device] * one["loss_alone"]:
            found = f"packed rows see one another: logits {one['logits']:.2g} apart, relatively; loss {one['loss']:.4f}"
            expected = f"those of each row alone, loss {one['loss_alone']:.4f}"
            yield Finding("ML313", found, f"attention {attention}", expected)


def window(bed: Bed) -> Figures:
    """Load the base as it is, and with a window of four tokens; compare the logits of a row within it and beyond."""
    import torch

    from pytest_mistral_lora.checkpoint.base_model import load_base, read_config

    folders = {"as it is": bed.base, "4": _with_window(bed, _WINDOW), "none": _with_window(bed, None)}
    models = {name: load_base(folder, "fp32", "cpu") for name, folder in folders.items()}
    ids = torch.tensor([max(bed.encoded, key=lambda row: len(row.input_ids)).input_ids])
    with torch.inference_mode():
        narrow, wide = (models[name](input_ids=ids).logits[0] for name in ("4", "none"))
    apart = (narrow - wide).abs().amax(dim=-1)
    return {
        "windows": {
            name: [read_config(folder).get("sliding_window"), models[name].config.sliding_window]
            for name, folder in folders.items()
        },
        "within": float(apart[:_WINDOW].max()),
        "beyond": float(apart[_WINDOW:].max()),
    }


def _with_window(bed: Bed, tokens: int | None) -> Path:
    folder = bed.scratch / f"window-{tokens}"
    folder.mkdir(exist_ok=True)
    config = json.loads((bed.base / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": tokens}), encoding="utf-8")
    os.link(bed.base / "model.safetensors", folder / "model.safetensors")
    return folder


def _window(figures: Figures, device: str) -> Iterator[Finding]:
    for name, (configured, loaded) in figures["windows"].items():
        if configured != loaded:
            place = f"config.json, sliding_window ({name})"
            yield Finding("ML323", f"the loaded model's window is {loaded}", place, str(configured))
    if figures["within"] > TOLERANCE[device] or not figures["beyond"] > 10 * TOLERANCE[device]:
        found = f"logits change by {figures['within']:.2g} within and by {figures['beyond']:.2g} beyond"
        yield Finding("ML323", found, f"a window of {_WINDOW} tokens", "nothing within, something beyond")


def generation(bed: Bed) -> Figures:
    """Compare what is generated with a greedy search by hand, and with batches that are padded on either side."""
    from pytest_mistral_lora.chat.rows import read_rows
    from pytest_mistral_lora.training.generate.generate import generate, load_adapted

    model = load_adapted(bed.adapter, bed.base, "fp32", "cpu")
    rows = list(read_rows(bed.folder / "rows.jsonl"))
    found = [list(one.ids) for one in generate(model, bed.encoder, rows, max_new_tokens=_NEW_TOKENS)]
    prompts = [bed.encoder.prompt(row) for row in rows]
    eos = bed.encoder.eos_id
    return {
        "generated": found,
        "by_hand": [_greedy(model, prompt, eos) for prompt in prompts],
        "left": _batch(model, prompts, eos, left=True),
        "right": _batch(model, prompts, eos, left=False),
    }


def _greedy(model: Any, prompt: Sequence[int], eos: int) -> list[int]:
    """Generate without a cache, a mask, or transformers' own loop."""
    import torch

    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + _NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != eos):
            ids.append(int(_logits(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def _batch(model: Any, prompts: Sequence[Sequence[int]], eos: int, *, left: bool) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    length = max(map(len, prompts))
    rows = [list(prompt) for prompt in prompts], [[1] * len(prompt) for prompt in prompts]
    pads = [[0] * (length - len(prompt)) for prompt in prompts]
    ids, mask = (
        torch.tensor([pad + own if left else own + pad for pad, own in zip(pads, side, strict=True)]) for side in rows
    )
    config = GenerationConfig(do_sample=False, max_new_tokens=_NEW_TOKENS, eos_token_id=eos, pad_token_id=0)
    with torch.inference_mode():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, length:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in output]


def _generation(figures: Figures, device: str) -> Iterator[Finding]:
    for name, expected in (("by_hand", "a greedy search by hand"), ("left", "a batch that is padded on the left")):
        for index, (one, other) in enumerate(zip(figures["generated"], figures[name], strict=True)):
            if one != other:
                yield Finding("ML324", f"generated {one}", f"row {index + 1}", f"{other}, as {expected} does")
    if figures["right"] == figures["left"]:
        yield Finding("ML324", "padding on the right goes unseen", "", "completions that show it")


def merged(adapter: Path, base: Path) -> Any:
    """Return base and adapter merged into one plain model, in float32 on the CPU."""
    from pytest_mistral_lora.training.generate.generate import load_adapted

    return load_adapted(adapter, base, "fp32", "cpu").merge_and_unload(safe_merge=True)


def merging(bed: Bed) -> Figures:
    """Compare the merged model with base and adapter: logits, choices, and how often the update is in the weights."""
    import torch

    from pytest_mistral_lora.training.generate.generate import load_adapted

    whole = load_adapted(bed.adapter, bed.base, "fp32", "cpu")
    one = merged(bed.adapter, bed.base).eval()
    apart, largest, choices = 0.0, 0.0, 0
    with torch.inference_mode():
        for row in bed.encoded:
            expected, found = (_logits(model, row.input_ids) for model in (whole, one))
            apart = max(apart, float((found - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
            places = [place - 1 for place, _ in supervised(row)]
            choices += int((found.argmax(-1) != expected.argmax(-1))[places].sum())
    return {"apart": apart / largest, "other_choices": choices, "strength": _strength(one, bed)}


def _strength(model: Any, bed: Bed) -> float:
    """Return how many times the adapter's update, recomputed by hand, is in a model's weights: 1 is right."""
    from safetensors.torch import load_file

    base: dict[str, torch.Tensor] = {
        name: tensor.double() for name, tensor in load_file(bed.base / "model.safetensors").items()
    }
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    along, square = 0.0, 0.0
    for name, wanted in adapted_weights(base, load_file(bed.adapter / "adapter_model.safetensors"), SCALE).items():
        update = wanted - base[name]
        along += float(((weights[name] - base[name]) * update).sum())
        square += float((update * update).sum())
    return along / square


def _merging(figures: Figures, device: str) -> Iterator[Finding]:
    if figures["apart"] > _MERGED or figures["other_choices"]:
        found = f"logits are {figures['apart']:.2g} apart, relatively; {figures['other_choices']} greedy ids differ"
        yield Finding("ML325", found, "the merged model", f"at most {_MERGED} apart, and the same ids")
    if abs(figures["strength"] - 1) > 1e-3:
        found = f"the adapter is merged {figures['strength']:.3f} times"
        yield Finding("ML325", found, "the merged model", "once, scaled by alpha / r")


LAWS = (
    Law("packed-as-unpacked", "ML313", packing, _packing),
    Law("window-is-the-checkpoints", "ML323", window, _window),
    Law("generates-as-by-hand", "ML324", generation, _generation, of_adapter=True),
    Law("merged-as-adapter", "ML325", merging, _merging, of_adapter=True),
)
