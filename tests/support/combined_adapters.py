"""Adapters that PEFT combines from others, on a tiny base."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from of_classes import COMMIT, tiny_base
from peft import LoraConfig, get_peft_model
from transformers import MistralForCausalLM

RANK = 4


@dataclass(frozen=True)
class CombinedAdapters:
    """Two adapters, and the one that PEFT makes of them; tests that change them copy them first."""

    base: Path
    sources: tuple[Path, Path]
    combined: Path


_MADE: dict[str, CombinedAdapters] = {}


def combined_adapters(
    mode: str,
    weights: tuple[float, ...] = (0.7, 0.3),
    *,
    rank: int | None = None,
    dtype: torch.dtype = torch.float32,
    **settings: Any,
) -> CombinedAdapters:
    """Return two adapters, and what `add_weighted_adapter` makes of them; the same arguments give the same folders.

    Args:
        mode: PEFT's `combination_type`.
        weights: The weight of the first adapter, and of the second; with one weight, the first alone is taken.
        rank: PEFT's `svd_rank`.
        dtype: dtype of the adapters.
        settings: More settings of PEFT's `LoraConfig`, for both.
    """
    key = repr((mode, weights, rank, dtype, settings))
    if key not in _MADE:
        _MADE[key] = _combine(mode, weights, rank, dtype, settings)
    return _MADE[key]


def _combine(
    mode: str, weights: tuple[float, ...], rank: int | None, dtype: torch.dtype, settings: dict[str, Any]
) -> CombinedAdapters:
    base, folder = tiny_base("mistral"), Path(tempfile.mkdtemp(prefix="combined-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(
        task_type="CAUSAL_LM", **{"r": RANK, "lora_alpha": 2 * RANK, "target_modules": targets, **settings}
    )
    random = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = MistralForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = get_peft_model(model, config, adapter_name="first")
        adapted.add_adapter("second", config)
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                if ".lora_B" in name:
                    parameter.data.normal_(std=0.02, generator=random)
                parameter.data = parameter.data.to(dtype)
        names = ["first", "second"][: len(weights)]
        adapted.add_weighted_adapter(names, list(weights), "combined", combination_type=mode, svd_rank=rank)
        adapted.save_pretrained(folder)
    for name in ("first", "second", "combined"):
        file = folder / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"revision": COMMIT}))
    return CombinedAdapters(base, (folder / "first", folder / "second"), folder / "combined")
