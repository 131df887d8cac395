"""Mistral's own tokenization, the truth for ids, and the facts of each tokenizer version."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = [
    "SHIPPED",
    "VERSION",
    "WRITES_TEMPLATES",
    "Oracle",
    "is_mistral_tokenizer",
    "shipped_tokenizer",
]

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.oracle import (
        SHIPPED,
        VERSION,
        WRITES_TEMPLATES,
        Oracle,
        is_mistral_tokenizer,
        shipped_tokenizer,
    )
else:

    def __getattr__(name: str) -> object:
        """Import a public name on first use: the facts of versions do not need mistral-common, which takes a second."""
        if name in __all__:
            return getattr(import_module(f"{__name__}.oracle"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
