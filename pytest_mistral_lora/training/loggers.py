"""Loggers of transformers that get a run's log: only those that the recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import RecipeError

_PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "flyte": "flytekit",
}
"""What to install for a logger, where it is not called as the logger is."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that transformers does not know, or that are not installed.

    Raises:
        RecipeError: Saying which are known, or what to install.
    """
    for index, name in enumerate(names):
        _logger(name, f"training.report_to[{index}]")


def loggers(names: Sequence[str], folder: Path, *, writes: bool) -> list[Any]:
    """Return the callbacks of the loggers.

    Args:
        names: What the recipe names.
        folder: Where TensorBoard's files go; the other loggers have settings of their own for that.
        writes: Whether this process is the one that logs.
    """
    found = [_logger(name, "training.report_to") for name in names]
    for name, callback in zip(names, found, strict=True):
        if name == "tensorboard" and writes:
            # its own choice is below the folder of checkpoints, which a finished run removes
            callback.tb_writer = callback._SummaryWriter(log_dir=str(folder))
    return found


def _logger(name: str, place: str) -> Any:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise RecipeError(f"{name!r}", place=place, expected=f"loggers that transformers knows: {known}")
    try:
        return INTEGRATION_TO_CALLBACK[name]()
    except (RuntimeError, ImportError) as error:
        raise RecipeError(
            f"{name!r} is not installed",
            place=place,
            next_step=f"Install it: pip install {_PACKAGES.get(name, name)}, or leave it out of report_to.",
        ) from error
