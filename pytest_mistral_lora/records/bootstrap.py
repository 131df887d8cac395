"""The bootstrap interval of a ratio of sums over rows, such as a difference of loss a token."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
"""Share of the resamples that the interval holds."""

RESAMPLES = 10_000
SEED = 0

_MOST_DRAWS = 1 << 22
"""Most rows that are drawn at once: 32 MiB of indices."""


class Interval(NamedTuple):
    """A bootstrap interval.

    Attributes:
        low: Its lower end.
        high: Its upper end.
    """

    low: float
    high: float


def paired_interval(
    differences: npt.ArrayLike, weights: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Return the percentile interval of `sum(differences) / sum(weights)` over rows that are drawn with replacement.

    A row brings both models' values along: the interval is of the paired difference. The order of the rows does not
    change it, and equal rows and seeds give the same numbers.

    Args:
        differences: Second model minus first, summed over the tokens of each row, `(rows,)` float64.
        weights: Tokens of each row, `(rows,)`; 1 for a rate. Their sum in a resample must not be 0.
        resamples: Number of resamples.
        seed: Seed of the resamples.

    Raises:
        ValueError: If there is no row, a weight is not positive, or the two have different lengths.
    """
    sums, counts = np.asarray(differences, np.float64), np.asarray(weights, np.float64)
    if sums.ndim != 1 or sums.shape != counts.shape or not len(sums) or not (counts > 0).all():
        raise ValueError(f"{sums.shape} differences and {counts.shape} weights; expected as many of both, weights > 0")
    # sorted: draws are indices, and sums depend on their order
    order = np.lexsort((counts, sums))
    sums, counts = sums[order], counts[order]
    generator, found = np.random.default_rng(seed), []
    at_once = max(1, _MOST_DRAWS // len(sums))
    for start in range(0, resamples, at_once):
        drawn = generator.integers(0, len(sums), (min(at_once, resamples - start), len(sums)))
        found.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    outside = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(found), (outside, 1 - outside))
    return Interval(float(low), float(high))
