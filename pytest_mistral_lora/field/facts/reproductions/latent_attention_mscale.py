"""Mistral4ForCausalLM of transformers leaves mscale_all_dim out of the scale of its attention."""

from __future__ import annotations

import math

from transformers import Mistral4Config, Mistral4ForCausalLM

FACTOR = 128.0


def main() -> None:
    """Compare the scale of a tiny model's attention with that of the same model without YaRN."""
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.1}
    yarn = {"rope_type": "yarn", "factor": FACTOR, "mscale": 1.0, "mscale_all_dim": 1.0}
    sizes = {
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 1024,
    }
    model = Mistral4ForCausalLM(Mistral4Config(**sizes, rope_parameters=rope | yarn))
    found = model.model.layers[0].self_attn.scaling / 16**-0.5
    expected = (0.1 * math.log(FACTOR) + 1) ** 2
    state = "no longer true" if math.isclose(found, expected, rel_tol=1e-6) else "still true"
    print(f"{state}: scores are multiplied by {found:.3f}, where YaRN has {expected:.3f}")


if __name__ == "__main__":
    main()
