"""The settings of an adapter that vLLM and SGLang share the fate of: they load a plain LoRA alone.

vLLM: vllm/lora/peft_helper.py, vllm/lora/lora_model.py; SGLang: sglang/srt/lora/lora_config.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.faults import ProgramFault
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

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
