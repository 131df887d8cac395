"""Measure how often the gate's bootstrap interval holds the true difference: `python scripts/gate_coverage.py`.

It prints a table: for each kind of rows and each number of rows, the share of trials whose interval
holds the true value (95 % is the aim), and the share whose whole interval is above it, which would be a failure of an
adapter that is exactly at the limit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pytest_mistral_lora.records.bootstrap import paired_interval

Rows = tuple[np.ndarray, np.ndarray]
Draw = Callable[[np.random.Generator, int], Rows]
ROWS = (4, 8, 12, 20, 40, 100)


class Population(NamedTuple):
    """A kind of rows.

    Attributes:
        title: Its name.
        draw: Returns the differences and the tokens of some of its rows.
    """

    title: str
    draw: Draw


def _tokens(generator: np.random.Generator, rows: int) -> np.ndarray:
    # answers of 8 to 800 tokens: the lengths of chat data have a long tail
    return np.ceil(np.exp(generator.normal(4.4, 0.8, rows)))


def _even(generator: np.random.Generator, rows: int) -> Rows:
    tokens = _tokens(generator, rows)
    return generator.normal(0.0, 0.2, rows) * tokens, tokens


def _skewed(generator: np.random.Generator, rows: int) -> Rows:
    tokens = _tokens(generator, rows)
    return (np.exp(generator.normal(0.0, 1.0, rows)) - np.exp(0.5)) * 0.1 * tokens, tokens


def _few_bad(generator: np.random.Generator, rows: int) -> Rows:
    tokens = _tokens(generator, rows)
    bad = generator.random(rows) < 0.1
    return (generator.normal(0.0, 0.05, rows) + 1.0 * bad - 0.1) * tokens, tokens


def _rates(generator: np.random.Generator, rows: int) -> Rows:
    # 20 % of the answers pass with one model alone, as many with either
    one, other = generator.random(rows), generator.random(rows) < 0.5
    return np.where(one < 0.2, np.where(other, 1.0, -1.0), 0.0), np.ones(rows)


POPULATIONS = (
    Population("differences alike in all rows", _even),
    Population("skewed differences", _skewed),
    Population("a tenth of the rows bad", _few_bad),
    Population("rates: a fifth of the answers differ", _rates),
)


def coverage(draw: Draw, rows: int, *, trials: int, resamples: int = 1000, seed: int = 0) -> tuple[float, float, float]:
    """Return the shares of intervals that hold the true value 0, that are above it, and that are below it."""
    generator, below, above = np.random.default_rng(seed), 0, 0
    for trial in range(trials):
        low, high = paired_interval(*draw(generator, rows), resamples=resamples, seed=trial)
        above += low > 0
        below += high < 0
    return 1 - (above + below) / trials, above / trials, below / trials


def lines(trials: int, counts: Sequence[int] = ROWS) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| rows | " + " | ".join(population.title for population in POPULATIONS) + " |"
    yield "|---|" + "---|" * len(POPULATIONS)
    for rows in counts:
        cells = []
        for population in POPULATIONS:
            held, above, below = coverage(population.draw, rows, trials=trials)
            cells.append(f"{held:.1%} ({above:.1%} above, {below:.1%} below)")
        yield f"| {rows} | {' | '.join(cells)} |"


if __name__ == "__main__":
    for line in lines(int(sys.argv[1]) if len(sys.argv) > 1 else 4000):
        print(line, flush=True)
