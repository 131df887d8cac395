"""Where a run computes, and in which precision."""

from __future__ import annotations

import os
from typing import Any

import torch

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.recipe import Training


def on_gpu(training: Training) -> bool:
    """Say whether the model runs on a GPU.

    Raises:
        RecipeError: If the recipe asks for CUDA and there is none.
    """
    available = torch.cuda.is_available()
    if training.device == "cuda" and not available:
        raise RecipeError("'cuda', but no CUDA device is available", place="training.device", expected="auto or cpu")
    return available and training.device != "cpu"


def precision_of(training: Training) -> Any:
    """Return `bf16`, `fp16` or `fp32`: what the recipe says, or what `auto` comes to here.

    Raises:
        RecipeError: If the recipe asks for fp16 on a CPU, where nothing scales its loss.
    """
    if training.precision == "fp16" and not on_gpu(training):
        raise RecipeError("'fp16', and the run is on the CPU", place="training.precision", expected="fp32 or bf16")
    if training.precision != "auto":
        return training.precision
    # an older GPU emulates bf16 slowly
    return "bf16" if on_gpu(training) and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def device_count() -> int:
    """Return the number of processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process among those of the run on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Say whether this is the process of the run that speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def device_of(training: Training) -> str:
    """Return the torch device of this process."""
    return f"cuda:{local_rank()}" if on_gpu(training) else "cpu"
