"""Finished runs that are changed, and trainers that generate or merge otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gallery import Artifact, mutant
from safetensors.torch import load_file, save_file
from trained_run import SOUND
from transformers import GenerationConfig


def edited(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    file.unlink()
    save_file(tensors, file)


def answered(artifact: Artifact, text: str) -> None:
    """Change the row's answer after the training."""
    rows = artifact["folder"] / "rows.jsonl"
    rows.write_text(rows.read_text().replace("Paris.", text))


@mutant("ML301.answers ML305 ML706", says="said 'Paris.'")
def another_answer(artifact: Artifact) -> None:
    """The adapter says another answer than the row has."""
    answered(artifact, "Lyon.")


@mutant("ML301.answers ML305 ML706", says="tokens are supervised")
def longer_answer(artifact: Artifact) -> None:
    """The row's answer has more tokens than the one that was trained on."""
    answered(artifact, "Paris, as it has always been.")


@mutant("ML302", says="lm_head.weight is not as it was")
def changed_base(artifact: Artifact) -> None:
    """Training changed a tensor of the base."""
    artifact["base_tensors"]["lm_head.weight"] = artifact["base_tensors"]["lm_head.weight"] + 1e-3


@mutant("ML303", says="did not move")
def still_layer(artifact: Artifact) -> None:
    """One tensor of the adapter is as it was before training."""
    artifact["tensors"][artifact["layer"]] = artifact["initial"][artifact["layer"]]


@mutant("ML301.loss")
def loss_that_stays(artifact: Artifact) -> None:
    """The loss does not fall."""
    artifact["losses"][:] = [artifact["losses"][0]] * len(artifact["losses"])


@mutant("ML305 ML403 ML702", says="logits are up to")
def zeroed_layer(artifact: Artifact) -> None:
    """A layer of the saved adapter is zero."""

    def zero(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(name for name in tensors if ".lora_B." in name)].zero_()

    edited(artifact["folder"] / "adapter" / "adapter_model.safetensors", zero)


@mutant("ML305 ML325 ML702", "I61", says="merged 0.500 times")
def another_alpha(artifact: Artifact) -> None:
    """The scale is edited in the saved configuration."""
    file = artifact["folder"] / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 8}))


def generates_in_a_batch(artifact: Artifact, *, left: bool, masked: bool) -> None:
    """Generate all rows at once."""

    def generate(model: Any, encoder: Any, rows: Any, *, max_new_tokens: int = 256, **_: Any) -> Any:
        if not rows:
            return []
        prompts = [list(encoder.prompt(row)) for row in rows]
        length = max(map(len, prompts))
        pad = 0 if masked else encoder.vocab_size - 1
        ids = torch.tensor([_padded(prompt, length, pad, left) for prompt in prompts])
        mask = torch.tensor([_padded([1] * len(prompt), length, 0 if masked else 1, left) for prompt in prompts])
        config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=encoder.eos_id, pad_token_id=0)
        with torch.inference_mode():
            found = model.eval().generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, length:]
        return [_completion(one, encoder, row, index) for index, (one, row) in enumerate(zip(found, rows, strict=True))]

    artifact["generate"] = generate


def _padded(ids: list[int], length: int, pad: int, left: bool) -> list[int]:
    padding = [pad] * (length - len(ids))
    return padding + ids if left else ids + padding


def _completion(found: Any, encoder: Any, row: Any, index: int) -> Any:
    from pytest_mistral_lora.training.generate import Completion, last_turn_ids

    ids = found.tolist()
    ids = tuple(ids[: ids.index(encoder.eos_id) + 1] if encoder.eos_id in ids else ids)
    expected = last_turn_ids(encoder.encode(row))
    stop = "eos" if ids and ids[-1] == encoder.eos_id else "length"
    return Completion(index, 0, ids, encoder.decode(ids), stop, expected, ids == expected)


@mutant("ML301.answers ML324", "I42", says="as a greedy search by hand does", slow=True)
def padded_on_the_right(artifact: Artifact) -> None:
    """Prompts of a batch are padded on the right."""
    generates_in_a_batch(artifact, left=False, masked=True)


@mutant("ML301.answers ML324", "I41")
def batch_without_a_mask(artifact: Artifact) -> None:
    """A batch is padded on the left, and the padding is not masked, so answers differ from those of single prompts."""
    generates_in_a_batch(artifact, left=True, masked=False)


def merges(artifact: Artifact, change: Callable[[Any, Any], None]) -> None:
    """Merge, and change the weights: given the merged model's and the base's, by name."""

    def merged(adapter: Path, base: Path) -> Any:
        model = SOUND["merged"](adapter, base)
        with torch.no_grad():
            change(model.state_dict(), load_file(base / "model.safetensors"))
        return model

    artifact["merged"] = merged


@mutant("ML325", "I15", says="logits are")
def merged_in_bfloat16(artifact: Artifact) -> None:
    """The merged weights are rounded to bfloat16."""

    def change(weights: Any, base: Any) -> None:
        for weight in weights.values():
            weight.copy_(weight.to(torch.bfloat16))

    merges(artifact, change)


@mutant("ML325", "I15")
def merged_into_a_quantised_base(artifact: Artifact) -> None:
    """The base is rounded to 4 bits before the adapter is merged into it."""

    def change(weights: Any, base: Any) -> None:
        for name, weight in weights.items():
            if "_proj" in name:
                step = base[name].abs().amax(dim=1, keepdim=True) / 7
                weight.add_((base[name] / step).round() * step - base[name])

    merges(artifact, change)


@mutant("ML325", "I61", says="merged 2.000 times")
def merged_twice(artifact: Artifact) -> None:
    """The adapter is merged into a base that has it already."""

    def change(weights: Any, base: Any) -> None:
        for name, weight in weights.items():
            weight.add_(weight - base[name])

    merges(artifact, change)


@mutant("ML325", "I61", says="merged 0.000 times")
def not_merged(artifact: Artifact) -> None:
    """The merged model is the base."""

    def change(weights: Any, base: Any) -> None:
        for name, weight in weights.items():
            weight.copy_(base[name])

    merges(artifact, change)
