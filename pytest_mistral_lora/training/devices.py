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
    """Return `bf16` or `fp32`: what the recipe says, or what `auto` comes to here."""
    if training.precision != "auto":
        return training.precision
    return "bf16" if on_gpu(training) and torch.cuda.is_bf16_supported() else "fp32"


def device_count() -> int:
    """Return the number of processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Say whether this process is the one that writes what a run leaves."""
    return os.environ.get("RANK", "0") == "0"


def device_of(training: Training) -> str:
    """Return the torch device of this process."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if on_gpu(training) else "cpu"
