"""Keep Mistral LoRA fine-tunes true to Mistral's own tokenization.

Importing this package imports nothing heavy: every public name is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

__all__ = [
    "CheckpointTokenizer",
    "EncodedRow",
    "Finding",
    "Golden",
    "GuardError",
    "MistralGuard",
    "Oracle",
    "Row",
    "RunResult",
    "Span",
    "TinyRun",
    "Verdict",
    "__version__",
    "audit",
    "guard",
    "judge",
    "read_rows",
    "train",
    "training_template",
]

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.encoded import EncodedRow, Span
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.row_files import read_rows
    from pytest_mistral_lora.chat.rows import Row
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer, training_template
    from pytest_mistral_lora.conformance.finding import Finding
    from pytest_mistral_lora.conformance.train.tiny_run import TinyRun
    from pytest_mistral_lora.errors import GuardError
    from pytest_mistral_lora.guarding.callback import MistralGuard, guard
    from pytest_mistral_lora.judging import Verdict, audit, judge
    from pytest_mistral_lora.records.goldens import Golden
    from pytest_mistral_lora.training.run import RunResult, train
else:
    # hidden from type checkers, which would accept any misspelt name as its result
    _MODULES = {
        "CheckpointTokenizer": "checkpoint.tokenizers",
        "EncodedRow": "chat.encoded",
        "Finding": "conformance.finding",
        "Golden": "records.goldens",
        "GuardError": "errors",
        "MistralGuard": "guarding.callback",
        "Oracle": "chat.oracle",
        "Row": "chat.rows",
        "RunResult": "training.run",
        "Span": "chat.encoded",
        "TinyRun": "conformance.train.tiny_run",
        "Verdict": "judging",
        "audit": "judging",
        "guard": "guarding.callback",
        "judge": "judging",
        "read_rows": "chat.row_files",
        "train": "training.run",
        "training_template": "checkpoint.tokenizers",
    }

    def __getattr__(name: str) -> object:
        """Import a public name on first use (PEP 562)."""
        if name in _MODULES:
            return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """List the public names for the completion of a shell or a notebook, loaded or not."""
        return sorted({*globals(), *__all__})
