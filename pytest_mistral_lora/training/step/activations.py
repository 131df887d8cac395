"""Activation checkpointing: activations are computed twice, and fewer of them are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def checkpoint_activations(model: Any) -> None:
    """Keep each layer's input alone, and compute the rest again in the backward pass."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    # reentrant checkpointing loses the gradient where no input of a layer needs one (frozen embeddings)
    enable({"use_reentrant": False})


def is_checkpointed(model: Any) -> bool:
    """Say whether any layer is checkpointed."""
    return bool(_checkpointed(model))


@contextmanager
def without_checkpointing(model: Any) -> Iterator[None]:
    """Let every layer keep its activations for a moment."""
    layers = _checkpointed(model)
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer in layers:
            layer.gradient_checkpointing = True


def _checkpointed(model: Any) -> list[Any]:
    return [one for one in model.modules() if getattr(one, "gradient_checkpointing", False)]
