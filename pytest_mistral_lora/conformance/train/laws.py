"""The laws of training, all of them, and how their figures are taken in one go."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.conformance.train import model_laws, run_laws, step_laws
from pytest_mistral_lora.conformance.train.harness import Bed, Law, take

LAWS: tuple[Law, ...] = (*step_laws.LAWS, *run_laws.LAWS, *run_laws.SETUP_LAWS, *model_laws.LAWS)


def measured(bed: Bed) -> dict[str, Any]:
    """Return the figures of every law by the name of what takes them: plain JSON data."""
    return {measure.__name__: take(measure, bed) for measure in dict.fromkeys(law.measure for law in LAWS)}
