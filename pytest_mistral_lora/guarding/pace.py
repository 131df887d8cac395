"""Which steps behind the first one are judged: one in so many that it takes no time that anybody notices."""

from __future__ import annotations

import math
import time

from pytest_mistral_lora.guarding.processes import from_each_process

SHARE = 0.005
"""The most of the time of a run that later steps may take to judge."""

LEAST = 40
"""The fewest steps from one that is judged to the next."""

TRIAL = 8
"""The step, counted from the first one, whose judgement is timed, beside the steps before it."""


class Pace:
    """The steps of a run that are judged: a function of their numbers alone, once it is known.

    Attributes:
        every: The steps from one that is judged to the next; None before it is known.
    """

    def __init__(self, every: int | None, first: int) -> None:
        """Begin with a step.

        Args:
            every: The number that the user asks for; None to measure it.
            first: The number of the first step, which is judged by itself.
        """
        self.every = every
        self._is_measured = every is None
        self._first, self._clock, self._seconds = first, 0.0, 0.0

    def is_judged(self, step: int) -> bool:
        """Return whether a step behind the first one is judged."""
        if self._is_timed(step):
            return True
        after = step - self._first - (TRIAL if self._is_measured else 0)
        return self.every is not None and after > 0 and after % self.every == 0

    def begin_step(self, step: int, guard_seconds: float) -> None:
        """Look at the clock before a step.

        Args:
            step: Its number.
            guard_seconds: What the guard itself has taken so far.
        """
        clock = time.perf_counter() - guard_seconds
        if step - self._first == 1:
            self._clock = clock
        elif step - self._first == TRIAL:
            self._seconds = (clock - self._clock) / (TRIAL - 1)

    def end_step(self, step: int, judging: float) -> None:
        """Set `every` if the judgement of this step is the one that is timed: each process must call it.

        The first process measures, and the others get its number.

        Args:
            step: The number of the step.
            judging: The seconds that its judgement has taken.
        """
        if self._is_timed(step):
            self.every = from_each_process(self.measured(judging))[0]

    def _is_timed(self, step: int) -> bool:
        return self._is_measured and step - self._first == TRIAL

    def measured(self, judging: float) -> int:
        """Return the steps from one that is judged to the next.

        Args:
            judging: The seconds that the judgement of a step has taken.
        """
        return max(LEAST, math.ceil(judging / (SHARE * max(self._seconds, 1e-6))))

    @property
    def words(self) -> str:
        """How often a step is judged, for a line."""
        return "" if self.every is None else f", one in {self.every:,}"
