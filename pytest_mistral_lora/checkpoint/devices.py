"""The device of a model, and the precision of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    import torch

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: Mapping[str, Precision] = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""The precision of each dtype of weights."""

Device = Literal["cpu", "cuda"]

_OPTION = Place.of("--device")


def choose_device(device: str, *, place: Place = _OPTION, error: type[InputError] = InputError) -> Device:
    """Return the device that a model runs on.

    Args:
        device: `cpu`, `cuda`, or `auto` for CUDA if it is available.
        place: The option or key that names it, for the error.
        error: The type of the error.

    Raises:
        InputError: If CUDA is requested and not available; of the type `error`.
    """
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        found = f"cuda, but torch {torch.__version__} finds no CUDA device here"
        raise error(found, place=place, expected="auto or cpu")
    return "cuda" if available and device != "cpu" else "cpu"


def torch_dtype(precision: Precision) -> torch.dtype:
    """Return the torch dtype of a precision."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
