"""How far the log-probabilities of answers moved from the recorded ones, and whether the dtype explains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from pytest_mistral_lora.records.judgement import TierTolerance

_FEWEST = 8
"""The fewest tokens whose mean is judged."""


@dataclass(frozen=True)
class Moved:
    """The moves of the tokens that a server answers as recorded.

    Attributes:
        by_case: The differences of log-probabilities of each transcript, in nats.
        precision: The precision of the served weights, and its source, as words.
        tolerance: What the precision explains; None if that is not known.
    """

    by_case: Mapping[str, Sequence[float]]
    precision: str
    tolerance: TierTolerance | None

    @cached_property
    def _all(self) -> list[float]:
        return [move for moves in self.by_case.values() for move in moves]

    @property
    def largest(self) -> float:
        """The largest difference, in nats; 0 if none is known."""
        return max(self._all, default=0.0)

    @property
    def mean(self) -> float:
        """The mean difference, in nats; 0 if none is known."""
        return fmean(self._all) if self._all else 0.0

    @property
    def furthest(self) -> str:
        """The transcript with the largest difference."""
        return max(self.by_case, key=lambda case: max(self.by_case[case], default=0.0))

    @property
    def is_explained(self) -> bool:
        """Whether dtype, quantisation and batch explain the moves; True if that cannot be judged."""
        if self.tolerance is None or not self._all:
            return True
        is_near = len(self._all) < _FEWEST or self.mean <= self.tolerance.mean_moved
        return is_near and self.largest <= self.tolerance.most_moved

    @property
    def numbers(self) -> str:
        """The numbers, beside the tolerance if there is one; empty if no difference is known."""
        if not self._all:
            return ""
        found = f"log-probabilities moved by {self.largest:.2g} nats at most, {self.mean:.2g} on average"
        return found if self.tolerance is None else f"{found}; {self.explained}"

    @property
    def as_numbers(self) -> Mapping[str, float]:
        """The largest difference and the mean, in nats."""
        return {"largest": self.largest, "mean": self.mean}

    @property
    def explained(self) -> str:
        """The largest moves that the precision explains, as words."""
        if self.tolerance is None:
            return "nothing"
        return f"{self.precision} explains {self.tolerance.most_moved:g} and {self.tolerance.mean_moved:g}"
