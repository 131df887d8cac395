"""A Mistral of some thousand weights, as transformers alone saves it, without a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_small_mistral(folder: Path, *, dtype: str = "float32", shard: str = "5GB", **settings: Any) -> Path:
    """Write the checkpoint, the same at each call, with settings of its configuration; torch's seed is then 0."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(architectures=["MistralForCausalLM"], **{**SIZES, **settings}))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard)
    return folder
