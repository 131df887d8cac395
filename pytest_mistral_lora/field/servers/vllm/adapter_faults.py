"""What vLLM would refuse of an adapter, or apply in another way than PEFT."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pytest_mistral_lora.checkpoint.architectures import architecture_of, is_known
from pytest_mistral_lora.conformance.adapter.layout import readable_tensors
from pytest_mistral_lora.errors import and_more
from pytest_mistral_lora.field.servers.refused_settings import expert_faults, refused_settings, scale_faults
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.faults import ProgramFault
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.tensors import adapted_modules

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `--max-lora-rank`: vllm/config/lora.py, MaxLoRARanks, of 0.32."""

_ABSORBED = "kv_b_proj"
_EFFECTS = {
    "use_dora": "refuses DoRA",
    "modules_to_save": "refuses modules that are trained in full",
    "lora_bias": "knows no bias of LoRA",
    "trainable_token_indices": "knows no tokens that are trained alone",
    "layer_replication": "replicates no layers: it leaves out the tensors of those that are not there",
}


def adapter_faults(folder: AdapterFolder, scales: Mapping[str, float]) -> Iterator[ProgramFault]:
    """Yield ML426 for each setting that vLLM does not load as PEFT does, and ML427 for a layer that it never calls.

    Args:
        folder: The adapter.
        scales: The scale of each adapted layer in PEFT, by the layer's name in the base.
    """
    config, place = folder.config, Place.of(folder.config_file)
    yield from refused_settings(folder, "vLLM", _EFFECTS)
    rank = largest_rank(folder)
    if rank > RANKS[-1]:
        yield ProgramFault("ML426", f"the rank is {rank}", "vLLM refuses it", place, f"{RANKS[-1]} at most")
    usual = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    keys = ("rank_pattern", "alpha_pattern")
    yield from scale_faults(folder, scales, "vLLM before 0.32", usual, keys)
    # 0.32, model_manager.py, _stack_moe_lora_weights: only models with is_3d_moe_weight, none of them of Mistral's
    yield from expert_faults(folder, "vLLM", "cuts the tensors of fused experts in another order than PEFT")
    base = folder.located_base.folder
    of_base = {} if base is None else base.config
    attention = architecture_of(of_base).text.attention if is_known(of_base) else ()
    # it multiplies by parts of the matrix that it cuts out when it loads the base, and never calls the layer
    layers = [name for name in adapted_modules(readable_tensors(folder)) if name.endswith(f".{_ABSORBED}")]
    if layers and _ABSORBED in attention:
        found, effect = f"{layers[0]}{and_more(1, len(layers))}", "vLLM loads its change, and applies it nowhere"
        others = ", ".join(name for name in attention if name != _ABSORBED)
        expected = f"the merged model, or an adapter on {others}"
        yield ProgramFault("ML427", found, effect, Place.of(folder.tensors_file), expected)


def largest_rank(folder: AdapterFolder) -> int:
    """Return the largest rank of a layer."""
    config = folder.config
    ranks: list[int] = [config["r"], *(config.get("rank_pattern") or {}).values()]
    return max(ranks)
