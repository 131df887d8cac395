"""Small bases and adapters of PEFT's own for merges, and the plan of a merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from small_mistral import write_small_mistral

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.base_model import load_base
from pytest_mistral_lora.records.adapter_folder import AdapterFolder
from pytest_mistral_lora.training.adapter import peft_quiet
from pytest_mistral_lora.training.merge.plan import plan_merge

ATTENTION = ["q_proj", "v_proj"]


def write_base(folder: Path, **settings: Any) -> Path:
    odd = {"vocab_size": 48, "intermediate_size": 40, "num_hidden_layers": 3, "head_dim": 8, "pad_token_id": None}
    return write_small_mistral(folder, initializer_range=0.2, **odd, **settings)


def write_adapter(folder: Path, base: Path, **options: Any) -> Path:
    """Save an adapter of PEFT's own in which every number does something."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **options}
    with peft_quiet():
        model = get_peft_model(load_base(BaseFolder(base), "fp32", "cpu"), LoraConfig(**options))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder


OPTIONS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"use_dora": True, "use_rslora": True},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": "all-linear", "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
    {"target_modules": ["lm_head", "down_proj"]},
    {"layers_to_transform": [1]},
    {"target_modules": r".*layers\.[02].*o_proj", "init_lora_weights": "gaussian"},
]


def planned(adapter: Path, base: Path) -> dict[str, Any]:
    return dict(plan_merge(AdapterFolder(adapter), BaseFolder(base)))
