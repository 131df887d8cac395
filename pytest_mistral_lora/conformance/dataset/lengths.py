"""The lengths of rows before the policies of a recipe, and what these policies and cuts change; and their figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, count, takewhile
from typing import Any


@dataclass
class Lengths:
    """The lengths of rows as they are encoded, before the policies of a recipe.

    Attributes:
        tokens: Number of rows by their tokens, refused and dropped rows included.
        longest: Tokens of the longest of these rows, and its negative place as `packed_place` returns it; the first
            row, if several are as long.
        beyond: Numbers of tokens, turns and prompts beyond `max_length`, by name.
        changed: Number of rows that the policies drop, cut, or keep without a label, by change.
    """

    tokens: Counter[int] = field(default_factory=Counter)
    longest: tuple[int, int] = (0, 0)
    beyond: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def note(self, tokens: int, at: int) -> None:
        """Add a row.

        Args:
            tokens: Its tokens.
            at: Its place, as `packed_place` returns it.
        """
        self.tokens[tokens] += 1
        self.longest = max(self.longest, (tokens, -at))

    def extend(self, other: Lengths) -> None:
        """Add other rows."""
        self.tokens.update(other.tokens)
        self.longest = max(self.longest, other.longest)
        # drop names with a count of 0, which a report would show
        self.beyond += other.beyond
        self.changed += other.changed


def percentile(counts: Mapping[int, int], percent: int) -> int:
    """Return the smallest of counted values that `percent` of them do not exceed; 0 for no values."""
    # the nearest rank, ceil(n * p / 100), in whole numbers: a float could round up to the next value
    rank = -(-sum(counts.values()) * percent // 100)
    below = accumulate(number for _, number in sorted(counts.items()))
    return next((value for value, seen in zip(sorted(counts), below, strict=True) if seen >= rank), 0)


def spread(counts: Mapping[int, int]) -> dict[str, Any]:
    """Return total, mean, median, 95th percentile and maximum of counted values, all exact."""
    total, number = sum(value * count for value, count in counts.items()), sum(counts.values())
    quantiles = {name: percentile(counts, percent) for name, percent in (("p50", 50), ("p95", 95), ("max", 100))}
    return {"total": total, "mean": round(total / number, 2) if number else 0.0, **quantiles}


_BINS = 16
_LEAST_CUT = 512


def histogram(lengths: Mapping[int, int]) -> list[dict[str, int]]:
    """Return the number of rows of each range of lengths, `from` and `to` included, both in tokens.

    The ranges are 1, 2 or 5 times a power of ten wide; the last one includes the longest hundredth of the rows.
    """
    if not lengths:
        return []
    most, longest = percentile(lengths, 99), max(lengths)
    width = next(size for power in count() for size in (10**power, 2 * 10**power, 5 * 10**power) if most < size * _BINS)
    bins: Counter[int] = Counter()
    for length, rows in lengths.items():
        bins[min(length, most) // width] += rows
    last = max(bins)
    return [
        {"from": index * width, "to": longest if index == last else (index + 1) * width - 1, "rows": bins[index]}
        for index in range(min(bins), last + 1)
    ]


def cuts(lengths: Mapping[int, int], max_length: int) -> list[dict[str, int]]:
    """Return the rows and tokens that a cut at `max_length` would touch and remove, and at each power of two.

    The powers are those from 512 to the first that cuts nothing.
    """
    longest = max(lengths, default=0)
    powers = takewhile(lambda power: power == _LEAST_CUT or power < 2 * longest, (_LEAST_CUT << n for n in count()))
    # a pass without a recipe has a length that no row reaches
    at = sorted({*powers, *([max_length] if max_length <= 2 * max(longest, _LEAST_CUT) else [])})
    return [
        {
            "max_length": most,
            "rows": sum(rows for length, rows in lengths.items() if length > most),
            "tokens": sum((length - most) * rows for length, rows in lengths.items() if length > most),
        }
        for most in at
    ]
