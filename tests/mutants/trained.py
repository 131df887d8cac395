"""A trained adapter, its base, its rows and the merged model, made once by the project's own trainer."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.base import load_base
from pytest_mistral_lora.checkpoint.tiny import write_tiny_base
from pytest_mistral_lora.records.files import listing, write_json
from pytest_mistral_lora.records.goldens import goldens_folder
from pytest_mistral_lora.records.hashing import sha256_file
from pytest_mistral_lora.records.identity import base_weights_sha256
from pytest_mistral_lora.records.manifest import build
from pytest_mistral_lora.training.adapter import base_tensors, peft_quiet
from pytest_mistral_lora.training.recipe import parse_recipe
from pytest_mistral_lora.training.run import train

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Trained:
    """What one short run needs and leaves."""

    base: Path
    rows: Path
    adapter: Path
    merged: Path


@cache
def trained() -> Trained:
    """Train for two steps, and merge the result."""
    folder = Path(tempfile.mkdtemp(prefix="trained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = Path(shutil.copy(goldens_folder() / "training" / "conversations.jsonl", folder / "rows.jsonl"))
    base = write_tiny_base(folder / "base", shipped_tokenizer("spm-v3"))
    result = train(parse_recipe(_recipe(base), folder=folder, place="the recipe of the gallery"))
    merged = _merge(result.output, base, folder / "merged")
    torch.set_num_threads(threads)
    return Trained(base, rows, result.output, merged)


def _recipe(base: Path) -> dict[str, Any]:
    return {
        "base": {"path": "base", "weights_sha256": base_weights_sha256(base)},
        "data": {"train": ["rows.jsonl"]},
        "lora": {"r": 8, "alpha": 16},
        "training": {
            "steps": 2,
            "learning_rate": 0.01,
            "schedule": "constant",
            "batch_size": 5,
            "precision": "fp32",
            "device": "cpu",
        },
        "output": "adapter",
    }


def _merge(adapter: Path, base: Path, folder: Path) -> Path:
    with peft_quiet():
        model = PeftModel.from_pretrained(load_base(base, "fp32", "cpu"), adapter).merge_and_unload()
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns(WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in base_tensors(model).items()}, folder / WEIGHTS)
    manifest = json.loads((adapter / "manifest.json").read_text())
    parent = {
        "manifest_sha256": sha256_file(adapter / "manifest.json"),
        "tensors_sha256": manifest["lora"]["tensors_sha256"],
        "merge_dtype": "float32",
        "max_abs_logit_difference": 1e-6,
        "greedy_equal": True,
    }
    kept = {key: value for key, value in manifest.items() if key not in ("lora", "template", "dataset", "masking")}
    kept = {key: value for key, value in kept.items() if key not in ("training", "evaluation")}
    write_json(
        folder / "manifest.json", build(**{**kept, "kind": "merged", "files": listing(folder), "parent": parent})
    )
    return folder


def copied(source: Path, target: Path) -> Path:
    """Copy a folder; large files become hard links, which a change must replace and never write to."""
    return Path(shutil.copytree(source, target, copy_function=_copy))


def _copy(source: str, target: str) -> str:
    if source.endswith(WEIGHTS) and Path(source).name == WEIGHTS:
        os.link(source, target)
        return target
    return shutil.copy2(source, target)


def replace_weights(file: Path, **changes: torch.Tensor) -> None:
    """Write a safetensors file again with other tensors, beside the one that it was linked to."""
    from safetensors.torch import load_file

    tensors = {**load_file(file), **changes}
    file.unlink()
    save_file(tensors, file)
