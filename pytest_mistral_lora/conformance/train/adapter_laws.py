"""Laws of the trained adapter, loaded again: its answers, and base and adapter merged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.train.harness import SCALE, Figures, TrainerHarness, TrainingLaw
from pytest_mistral_lora.conformance.train.model_laws import row_logits
from pytest_mistral_lora.conformance.train.step_laws import merge_by_hand, plain_model, supervised_positions

# Of the largest logit, in float32; 3e-6 was measured.
_MERGED_TOLERANCE = 5e-5
_NEW_TOKENS = 16


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
                ids.append(int(row_logits(model, ids)[-1].argmax()))
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
            expected, found = (row_logits(model, row.input_ids) for model in (whole, merged))
            apart = max(apart, float((found - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
            places = [place - 1 for place, _ in supervised_positions(row)]
            choices += int((found.argmax(-1) != expected.argmax(-1))[places].sum())
    base = {name: tensor.double() for name, tensor in plain_model(harness.base, torch.float32).state_dict().items()}
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


ADAPTER_LAWS = (
    TrainingLaw("generates-as-by-hand", "ML324", measure_generation, _judge_generation, needs_adapter=True),
    TrainingLaw("merged-as-adapter", "ML325", measure_merging, _judge_merging, needs_adapter=True),
)
