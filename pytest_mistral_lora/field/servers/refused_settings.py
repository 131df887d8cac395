"""The settings of an adapter that vLLM and SGLang share the fate of: they load a plain LoRA alone.

vLLM: vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/lora/model_manager.py; SGLang: sglang/srt/lora/lora.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

from pytest_mistral_lora.conformance.adapter.layout import readable_tensors
from pytest_mistral_lora.errors import and_more
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.faults import ProgramFault
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

_FUSED = re.compile(r"\.experts\.(base_layer\.)?lora_[AB]\.")
"""Names of PEFT's tensors of experts that transformers 5 keeps as one parameter; version 4 has a layer for each."""

PLAIN = "a plain LoRA, or the merged model"
"""What these servers load as PEFT does."""


def refused_settings(folder: AdapterFolder, title: str, effects: Mapping[str, str]) -> Iterator[ProgramFault]:
    """Yield ML426 for each setting that a server does not load as PEFT does.

    Args:
        folder: The adapter.
        title: The name of the server.
        effects: What the server does about a setting, by its key.
    """
    config, place = folder.config, Place.of(folder.config_file)
    for key, effect in effects.items():
        if config.get(key):
            yield ProgramFault("ML426", f"{key} is set", f"{title} {effect}", place, PLAIN)
    if config.get("bias") not in (None, "none"):
        found = f"bias is {config['bias']!r}"
        yield ProgramFault("ML426", found, f"{title} knows no trained biases", place, PLAIN)


def expert_faults(folder: AdapterFolder, title: str, effect: str) -> Iterator[ProgramFault]:
    """Yield ML426 for tensors of fused experts, as PEFT lays them out for transformers 5, or for `target_parameters`.

    Args:
        folder: The adapter.
        title: The name of the server.
        effect: What the server does with such tensors.
    """
    names = sorted(name for name in readable_tensors(folder) if _FUSED.search(name))
    if names:
        found = f"{names[0]}{and_more(1, len(names))}"
        yield ProgramFault("ML426", found, f"{title} {effect}", Place.of(folder.tensors_file), PLAIN)
    elif folder.config.get("target_parameters"):
        place = Place.of(folder.config_file)
        yield ProgramFault("ML426", "target_parameters is set", f"{title} does not read it", place, PLAIN)


def scale_faults(
    folder: AdapterFolder, scales: Mapping[str, float], title: str, usual: float, keys: tuple[str, ...]
) -> Iterator[ProgramFault]:
    """Yield ML426 if a server scales a layer otherwise than PEFT.

    Args:
        folder: The adapter.
        scales: The scale of each adapted layer in PEFT, by the layer's name in the base.
        title: The name of the server, with the versions that have the fault.
        usual: The scale that the server gives each layer.
        keys: The keys of the configuration that it does not read.
    """
    other = {layer: scale for layer, scale in scales.items() if not math.isclose(scale, usual)}
    if other:
        left_out = " and ".join(key for key in keys if folder.config.get(key))
        layer, scale = next(iter(other.items()))
        found = f"PEFT scales {layer} by {scale:g}{and_more(1, len(other))}"
        effect = f"{title} leaves out {left_out}, and scales it by {usual:g}"
        place = Place.of(folder.config_file)
        yield ProgramFault("ML426", found, effect, place, "one scale for every layer, or the merged model")
