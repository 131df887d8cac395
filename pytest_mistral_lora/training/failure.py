"""`failure.json`: why a run left no adapter. A launcher may not pass the exit code on; the file stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import (
    EXIT_BAD_INPUT,
    EXIT_FINDING,
    EXIT_INTERRUPTED,
    EXIT_OUT_OF_MEMORY,
    MistralLoraError,
    RowsError,
)
from pytest_mistral_lora.records.files import write_json

FAILURE = "failure.json"
_MEMORY_ADVICE = "Lower training.micro_batch_tokens, set activation_checkpointing: true, or use precision: bf16."


def exit_code(error: BaseException) -> int:
    """Return the exit code for an error: 1 failed, 2 bad input, 3 out of memory, 130 interrupted."""
    if isinstance(error, MistralLoraError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if is_out_of_memory(error):
        return EXIT_OUT_OF_MEMORY
    return EXIT_BAD_INPUT if isinstance(error, FileNotFoundError) else EXIT_FINDING


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether a device or the host ran out of memory: torch has a type for the one and a sentence for the other."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, MemoryError) or "OutOfMemoryError" in names or "can't allocate memory" in str(error)


def leave_failure(work: Path, error: BaseException) -> None:
    """Write `failure.json` into a run's work folder."""
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / FAILURE, describe(error))


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error as plain data: `cause`, `rows` (places of bad rows), `advice`, `exit_code`."""
    advice = error.next_step if isinstance(error, MistralLoraError) else ""
    if is_out_of_memory(error):
        advice = _MEMORY_ADVICE
    return {
        "error": type(error).__name__,
        "cause": str(error) or type(error).__name__,
        "rows": [one.place for one in error.errors] if isinstance(error, RowsError) else [],
        "advice": advice,
        "exit_code": exit_code(error),
    }
