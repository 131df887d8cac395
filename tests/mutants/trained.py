"""A trained adapter, its base, its rows and the merged model, made once by the project's own trainer and merge."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.conformance.train.harness import TrainerHarness
from pytest_mistral_lora.records.goldens import goldens_folder
from pytest_mistral_lora.training.merge import merge
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
    harness = TrainerHarness(folder, folder, "cpu")
    shutil.copy(goldens_folder() / "training" / "conversations.jsonl", harness.rows)
    write_tiny_base(harness.base, shipped_tokenizer("spm-v3"))
    result = train(harness.recipe(harness.adapter, steps=2, batch_size=5))
    merged = merge(result.output, folder / "merged", harness.base).output
    torch.set_num_threads(threads)
    return Trained(harness.base, harness.rows, result.output, merged)


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
