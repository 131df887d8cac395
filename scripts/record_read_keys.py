"""Record which keys of a configuration each class of the installed transformers reads, by the logits of tiny models.

A class reads a key if its logits change with the key's value. Run it under a version of transformers to add that
version to `pytest_mistral_lora/checkpoint/read_keys.toml`:

    $ python scripts/record_read_keys.py
"""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

RECORD = Path(__file__).parents[1] / "pytest_mistral_lora" / "checkpoint" / "read_keys.toml"
HEAD = """\
# The keys of config.json that each class reads, by the version of transformers: scripts/record_read_keys.py.
"""

_CLASSES = {
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mistral4": "Mistral4ForCausalLM",
    "llama": "LlamaForCausalLM",
}
_SCALED_FROM, _LENGTH = 16, 24
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": _SCALED_FROM,
    "max_position_embeddings": 64,
    "beta_fast": 1.0,
    "beta_slow": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.3,
}
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "sliding_window": None,
}
_OWN: Mapping[str, Mapping[str, Any]] = {
    "ministral": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mistral4": {
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 4,
        "v_head_dim": 12,
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
    },
}
_CHANGES: Mapping[str, Any] = {
    "rope_theta": 50.0,
    "factor": 2.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 0.5,
    "beta_slow": 0.2,
    "mscale": 0.8,
    "mscale_all_dim": 0.9,
    "attention_factor": 1.5,
    "llama_4_scaling_beta": 0.1,
}
"""Another value of each key of the rotary embedding."""


def read_keys(model_type: str) -> list[str] | None:
    """Return the keys that a class reads, in order; None if this version of transformers does not have the class."""
    if not hasattr(transformers, _CLASSES[model_type]):
        return None
    before, found = _logits(model_type, _ROPE), []
    for key, value in _CHANGES.items():
        if not torch.equal(before, _logits(model_type, {**_ROPE, key: value})):
            found.append(key)
    if not torch.equal(before, _logits(model_type, _ROPE, sliding_window=4)):
        found.append("sliding_window")
    layers = {"layer_types": ["sliding_attention", "sliding_attention"], "sliding_window": 16}
    before = _logits(model_type, _ROPE, sliding_window=16)
    if not torch.equal(before, _logits(model_type, _ROPE, **layers)):
        found.append("layer_types")
    # the name that a server's own reader of Mistral's format has for it
    scaling = {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 8}}
    if not torch.equal(_logits(model_type, _ROPE), _logits(model_type, _ROPE, **scaling)):
        found.append("llama_4_scaling")
    return sorted(found)


def _logits(model_type: str, rope: Mapping[str, Any], **more: Any) -> torch.Tensor:
    version_4 = int(transformers.__version__.split(".")[0]) < 5
    spelled: dict[str, Any] = {"rope_parameters": dict(rope)}
    if version_4:
        spelled = {"rope_scaling": {key: value for key, value in rope.items() if key != "rope_theta"}}
        spelled["rope_theta"] = rope["rope_theta"]
    given = {**_SIZES, **_OWN.get(model_type, {}), **spelled, **more}
    if model_type == "mistral4":
        given = {key: value for key, value in given.items() if key != "head_dim"}
    model_class = getattr(transformers, _CLASSES[model_type])
    config = model_class.config_class(**copy.deepcopy(given))
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).eval()
        ids = torch.arange(_LENGTH)[None] % _SIZES["vocab_size"]
        logits: torch.Tensor = model(input_ids=ids).logits
        return logits


def recorded() -> dict[str, dict[str, list[str]]]:
    """Return the record: the keys by class by version."""
    return tomllib.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def seen() -> dict[str, list[str]]:
    """Return the keys of each class of the installed version."""
    transformers.logging.set_verbosity_error()  # it warns of keys that a class does not know, and of ratios
    found = {name: read_keys(model_type) for model_type, name in _CLASSES.items()}
    return {name: keys for name, keys in found.items() if keys is not None}


def main() -> None:
    """Add the installed version to the record."""
    record = recorded() | {transformers.__version__: seen()}
    lines = [HEAD]
    for version in sorted(record, key=lambda text: [int(part) for part in text.split(".")]):
        lines.append(f'["{version}"]\n')
        for name, keys in record[version].items():
            lines.append(f"{name} = [" + ", ".join(f'"{key}"' for key in keys) + "]\n")
        lines.append("\n")
    RECORD.write_text("".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
