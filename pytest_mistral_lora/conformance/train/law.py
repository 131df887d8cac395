"""What a law of training is: figures, taken from the trainer at work, and a judgement on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.conformance.train.bed import Bed

Figures = Mapping[str, Any]
"""Plain JSON data."""

TOLERANCE = {"cpu": 2e-4, "cuda": 5e-3}
"""How far float32 may be from the same sum in another order, against the largest value: a fused loss needs 1e-4."""


@dataclass(frozen=True, slots=True)
class Law:
    """One law, and how it is seen to hold.

    Attributes:
        case: Name of its check.
        rule: Id of its rule.
        measure: Takes the figures; laws that share it share the figures.
        judge: Finds what is wrong with figures taken on a device, `cpu` or `cuda`.
        of_adapter: Whether it needs an adapter that the tiny run trained.
    """

    case: str
    rule: str
    measure: Callable[[Bed], Figures]
    judge: Callable[[Figures, str], Iterator[Finding]]
    of_adapter: bool = False

    def findings(self, figures: Figures, device: str) -> Iterator[Finding]:
        """Judge figures, or say what kept them from being taken."""
        if "failed" in figures:
            yield Finding(self.rule, figures["failed"], "the trainer on the tiny model", "figures to judge")
        else:
            yield from self.judge(figures, device)


def take(measure: Callable[[Bed], Figures], bed: Bed) -> Figures:
    """Take figures; a trainer that raises where it should not, or gives no number, is a figure too: `failed`."""
    try:
        figures = measure(bed)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}
    odd = [name for name, value in _numbers(figures) if not math.isfinite(value)]
    return {"failed": f"not a finite number: {', '.join(odd)}"} if odd else figures


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of plain data with the keys that lead to it."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _numbers(one, f"{name}.{key}".lstrip("."))
    elif isinstance(value, int | float):
        yield name, value
