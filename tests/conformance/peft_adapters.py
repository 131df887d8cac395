"""Adapters as PEFT alone saves them, on the checkpoint of `write_small_mistral`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import MistralForCausalLM

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.conformance.adapter.checks import cases
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.records.adapter_folder import AdapterFolder

COMMIT = "e0bc86c23ce5aae1db576c8cca6f06f1f73af2db"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(
    base: Path,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    embeddings: bool | str = "auto",
    **settings: Any,
) -> Path:
    """Make an adapter as another trainer would: PEFT alone, its lora_B moved, no manifest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(task_type="CAUSAL_LM", **{"target_modules": TARGETS, "revision": COMMIT, **settings})
        model = get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) * 0.02)
                parameter.data = parameter.data.to(dtype) if "lora_" in name else parameter.data
        model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def judged(folder: Path, base: Path | None) -> dict[str, Result]:
    return {name: judge() for name, judge in cases(AdapterFolder(folder, BaseFolder(base) if base else None)).items()}


def rules(results: dict[str, Result]) -> set[str]:
    return {finding.rule for result in results.values() for finding in result.findings}
