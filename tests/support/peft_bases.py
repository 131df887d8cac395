"""A small base with an adapter on it, as transformers and PEFT save them: no manifest, no tokenizer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import MistralConfig, MistralForCausalLM


def write_base_and_lora(
    folder: Path, dtype: torch.dtype, *, tied: bool = False, std: float = 0.02, **settings: Any
) -> PeftModel:
    """Write `base` and `lora` into a folder, and return the model with the adapter.

    Args:
        folder: The folder.
        dtype: The dtype of the base.
        tied: Whether the embeddings are the head, too.
        std: Standard deviation of the numbers of B.
        settings: Settings of the `LoraConfig`.
    """
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tied}
    config = MistralConfig(architectures=["MistralForCausalLM"], **sizes, **heads)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        MistralForCausalLM(config).to(dtype).save_pretrained(folder / "base")
        model = MistralForCausalLM.from_pretrained(folder / "base", dtype=dtype)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        for name, parameter in adapted.named_parameters():
            if ".lora_B" in name:
                parameter.data.normal_(std=std)
            if "modules_to_save" in name:
                parameter.data += torch.randn_like(parameter) / 100
        adapted.save_pretrained(folder / "lora")
    return adapted
