"""The device of a model, and the precision of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pytest_mistral_lora.errors import InputError

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: Mapping[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The precision that each dtype of weights is."""

Device = Literal["cpu", "cuda"]


def choose_device(asked: str, *, place: str = "--device", error: type[InputError] = InputError) -> Device:
    """Return the device on which a model runs.

    Args:
        asked: `cpu`, `cuda`, or `auto` for CUDA if there is a device.
        place: The option or key that asks, for the error.
        error: The type of the error.

    Raises:
        InputError: If CUDA is asked for and there is no device; of the type `error`.
    """
    import torch

    available = torch.cuda.is_available()
    if asked == "cuda" and not available:
        found = f"cuda, but torch {torch.__version__} finds no CUDA device here"
        raise error(found, place=place, expected="auto or cpu")
    return "cuda" if available and asked != "cpu" else "cpu"


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the torch dtype of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
