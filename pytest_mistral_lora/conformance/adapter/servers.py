"""The parts of an adapter that vLLM and SGLang refuse, or leave out without an error."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path

from pytest_mistral_lora.checkpoint.architectures import architecture_of, is_known
from pytest_mistral_lora.checkpoint.base_model import read_config
from pytest_mistral_lora.conformance.adapter.layout import AdapterLayout, readable_tensors
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError, and_more
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.records.tensors import adapted_modules

LARGEST_RANK = 512
"""vLLM's largest `--max-lora-rank`: vllm/config/lora.py, MaxLoRARanks."""

_ABSORBED = "kv_b_proj"

_TEXT_ALONE = re.compile(r"^base_model\.model\.(?:model\.)?layers\.\d+\.")

# vllm/lora/peft_helper.py, vllm/lora/lora_model.py and sglang/srt/lora/lora_config.py
_REFUSED = {
    "use_dora": "vLLM and SGLang refuse DoRA",
    "modules_to_save": "vLLM refuses modules that are trained in full",
    "lora_bias": "vLLM and SGLang know no bias of LoRA",
    "trainable_token_indices": "vLLM and SGLang know no tokens that are trained alone",
    "target_parameters": "vLLM and SGLang read the parameters of experts in other layouts",
    "layer_replication": "vLLM and SGLang replicate no layers: they leave out the tensors of those that are not there",
}
_PLAIN = "a plain LoRA, or the merged model"


def refusal_findings(folder: AdapterFolder, layout: AdapterLayout) -> Iterator[Finding]:
    """Yield each setting with which a server does not load an adapter, or loads another one than PEFT does."""
    config, place = folder.config, str(folder.config_file)
    for key, reason in _REFUSED.items():
        if config.get(key):
            yield Finding("ML426", f"{key} is set: {reason}", place, _PLAIN)
    if config.get("bias") not in (None, "none"):
        yield Finding("ML426", f"bias is {config['bias']!r}: vLLM and SGLang know no trained biases", place, _PLAIN)
    ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
    if max(ranks) > LARGEST_RANK:
        yield Finding("ML426", f"the rank is {max(ranks)}: vLLM refuses it", place, f"{LARGEST_RANK} at most")
    usual = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    other = {layer: scale for layer, scale in layout.scalings.items() if not math.isclose(scale, usual)}
    if other:
        keys = " and ".join(key for key in ("rank_pattern", "alpha_pattern") if config.get(key))
        layer, scale = next(iter(other.items()))
        found = f"vLLM leaves out {keys}: it scales {layer} by {usual:g}, and PEFT by {scale:g}"
        yield Finding("ML426", found + and_more(1, len(other)), place, "one scale for every layer, or the merged model")
    yield from _unserved_findings(folder, folder.located_base.folder)


def _unserved_findings(folder: AdapterFolder, base: Path | None) -> Iterator[Finding]:
    """Yield ML427 for adapted layers that vLLM loads without an error, and never applies."""
    config = {} if base is None else read_config(base)
    attention = architecture_of(config).text.attention if is_known(config) else ()
    # it multiplies by parts of the matrix that are cut out of the base when that is loaded, and never calls the layer
    layers = [name for name in adapted_modules(readable_tensors(folder)) if name.endswith(f".{_ABSORBED}")]
    if layers and _ABSORBED in attention:
        found = f"{layers[0]}{and_more(1, len(layers))}: vLLM loads its change, and applies it nowhere"
        others = ", ".join(name for name in attention if name != _ABSORBED)
        yield Finding("ML427", found, str(folder.tensors_file), f"the merged model, or an adapter on {others}")


def dropped_findings(folder: AdapterFolder, base: Path) -> Iterator[Finding]:
    """Yield a finding if the base is a model with images, and the tensors are named as those of its text alone."""
    config = read_config(base)
    try:
        tensors = folder.tensors
    except InputError:
        return
    names = [name for name in sorted(tensors) if _TEXT_ALONE.match(name)]
    if names and isinstance(config.get("text_config"), dict):
        found = f"{names[0]}{and_more(1, len(names))}: the layers of {base} are below language_model"
        right = names[0].replace("base_model.model.model.", "base_model.model.").replace(
            "base_model.model.", "base_model.model.model.language_model."
        )  # fmt: skip
        yield Finding("ML425", found, str(folder.tensors_file), right)
