"""Keep Mistral LoRA fine-tunes true to Mistral's own tokenization.

Importing this package imports nothing heavy: every public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "EncodedRow": "pytest_mistral_lora.chat.encoded",
    "Oracle": "pytest_mistral_lora.chat.oracle.mistral_common",
    "Row": "pytest_mistral_lora.chat.rows",
    "Span": "pytest_mistral_lora.chat.encoded",
    "read_rows": "pytest_mistral_lora.chat.rows",
    "training_template": "pytest_mistral_lora.checkpoint.tokenizers",
}

__all__ = ["EncodedRow", "Oracle", "Row", "Span", "__version__", "read_rows", "training_template"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
