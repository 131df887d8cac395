"""Weights in Mistral's own format beside those of transformers: a server that knows the format loads them instead."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pytest_mistral_lora.checkpoint.model_facts import ModelFacts
from pytest_mistral_lora.checkpoint.weights import Weights, interleaved
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place

_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Parts of a layer in Mistral's format, and in transformers': convert_mistral_weights_to_hf.py."""
_OUTSIDE = {
    "tok_embeddings.weight": "embed_tokens.weight",
    "norm.weight": "norm.weight",
    "output.weight": "lm_head.weight",
}
_FULL = frozenset({"F32", "F16", "BF16", "F64"})
_LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")


def consolidated_findings(
    stored: Weights, merged: Weights, config: Mapping[str, Any], place: Place
) -> Iterator[Finding]:
    """Yield ML443 for the first tensor in Mistral's format that is not the merged one.

    Args:
        stored: The tensors in Mistral's format.
        merged: The merged tensors.
        config: `config.json`, which has the numbers of heads.
        place: The file in Mistral's format.

    Raises:
        InputError: If no tensor can be compared, or a tensor cannot be read.
    """
    names = {_plain(name): name for name in merged}
    facts = ModelFacts(config)
    by_part = {"attention.wq": facts.heads, "attention.wk": facts.kv_heads}
    compared = 0
    for name in stored:
        match = _LAYER.fullmatch(name)
        part = match[2] if match else ""
        plain = f"layers.{match[1]}.{_NAMES[part]}.weight" if match and part in _NAMES else _OUTSIDE.get(name, "")
        if plain not in names:
            continue
        theirs, ours = stored.infos[name], merged.infos[names[plain]]
        if theirs.shape != ours.shape:
            yield Finding("ML443", f"{name} has shape {theirs.shape}", place, f"{ours.shape}, as {names[plain]}")
            return
        if not {theirs.dtype, ours.dtype} <= _FULL:
            continue  # quantised numbers are not compared
        values = merged.array(names[plain])
        if part in by_part:
            values = interleaved(values, by_part[part], names[plain])
        compared += 1
        given = stored.array(name)
        # a copy in another precision is the numbers of one, rounded to the other
        if not ((given == values.astype(given.dtype)).all() or (given.astype(values.dtype) == values).all()):
            found = f"{name} is not {names[plain]}: a server that knows Mistral's format loads it"
            yield Finding("ML443", found, place, "the merged weights, or no such file")
            return
    if not compared:
        raise InputError("no tensor of the consolidated file can be compared", place=place)


def _plain(name: str) -> str:
    for prefix in ("model.language_model.", "language_model.model.", "language_model.", "model."):
        name = name.removeprefix(prefix)
    return name
