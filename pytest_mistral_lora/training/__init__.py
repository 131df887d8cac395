"""From a recipe to an adapter: data, LoRA, loop, saved folder, smoke test. Knows nothing of pytest."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe, load_recipe
    from pytest_mistral_lora.training.run import RunResult, train

_LAZY = {"Recipe": "recipe", "RunResult": "run", "load_recipe": "recipe", "train": "run"}

__all__ = ["Recipe", "RunResult", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: reading a recipe needs no torch."""
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
