"""PEFT leaves the experts of a Mixtral out if transformers keeps them in one parameter, and its names are older."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}


def main() -> None:
    """Adapt the attention and the experts of a tiny model by their names of transformers 4."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS))
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"]))
    names = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    experts = [name for name in names if "experts" in name]
    state = "no longer true" if experts else "still true"
    print(f"{state}: {len(experts)} of {len(names)} adapted matrices are of experts")


if __name__ == "__main__":
    main()
