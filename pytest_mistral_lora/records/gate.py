"""The gate of a run: base and adapter on the same rows, and a verdict for each measurement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.escaping import printable

Verdict = Literal["passed", "failed", "undecided"]
Measured = Literal["loss", "rate"]

HELD_OUT, RETENTION, RATE = "held-out loss", "retention loss", "rate of "
"""The names of the lines, and the beginning of the name of a format check's line."""

FEWEST_CONVERSATIONS = 40
"""Fewest conversations whose interval is judged: of fewer it is too narrow. With so many it held the true value in 86
to 95 % of trials, and was wholly above it in at most 4 %, by `scripts/gate_coverage.py`."""

_MOST_CONVERSATIONS = 1_000_000
"""A need of more conversations than these is none that somebody can meet."""

_DECIMALS = 6
"""Digits of recorded numbers: far finer than any interval. A verdict is made from the rounded numbers."""


@dataclass(frozen=True, slots=True)
class GateLine:
    """One measurement of base and adapter on the same rows.

    Attributes:
        name: `held-out loss`, `retention loss`, or `rate of NAME` for a format check.
        measures: `loss`: nats a trained token, where less is better; `rate`: a share of answers, where more is better.
        base: The value of the base.
        adapter: The value of the adapter, or of the merged model.
        difference: Adapter minus base.
        low: Lower end of the interval of the difference.
        high: Upper end.
        limit: The difference that is still allowed: the largest of a loss, the smallest of a rate.
        rows: Number of rows.
        conversations: Number of conversations among them: a copy, or another answer to the same prompt, is no further
            observation; see `chat.likeness`.
        tokens: Trained tokens of these rows; 0 for a rate.
    """

    name: str
    measures: Measured
    base: float
    adapter: float
    difference: float
    low: float
    high: float
    limit: float
    rows: int
    conversations: int
    tokens: int = 0

    def __post_init__(self) -> None:
        # the name of a check can be any pattern, and is printed in tables
        object.__setattr__(self, "name", printable(self.name, lines=False))
        for name in ("base", "adapter", "difference", "low", "high"):
            # adding zero turns -0.0 into 0.0
            object.__setattr__(self, name, round(getattr(self, name), _DECIMALS) + 0.0)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GateLine:
        """Return the line that `to_json` made; its recorded verdict is not read."""
        return cls(**{name: data[name] for name in cls.__slots__})

    def to_json(self) -> dict[str, Any]:
        """Return the line as plain JSON data, with its verdict."""
        return {**asdict(self), "verdict": self.verdict}

    @property
    def _side(self) -> Verdict:
        """The side of the limit on which the whole interval is; `undecided` if the limit is within it."""
        low, high, limit = (self.low, self.high, self.limit) if self.measures == "loss" else self._turned
        if high <= limit:
            return "passed"
        return "failed" if low > limit else "undecided"

    @property
    def _turned(self) -> tuple[float, float, float]:
        """The interval and the limit of a rate as those of a loss."""
        return -self.high, -self.low, -self.limit

    @property
    def verdict(self) -> Verdict:
        """`passed` or `failed` if the interval is on that side of the limit, and the conversations are not too few."""
        return "undecided" if self.conversations < FEWEST_CONVERSATIONS else self._side

    @property
    def reason(self) -> str:
        """Why a verdict is undecided, and how many conversations may decide it; empty for another verdict."""
        if self.verdict != "undecided":
            return ""
        needed = self.needed_conversations
        enough = "no number of them is known to decide it" if needed is None else f"about {needed:,} may decide it"
        if self.conversations < FEWEST_CONVERSATIONS:
            fewest = f"an interval of fewer than {FEWEST_CONVERSATIONS} conversations is too narrow"
            return f"{self.rows_text}, and {fewest}; {enough}"
        return f"the limit {self.limit_text} is inside the interval {self.interval_text} of {self.rows_text}; {enough}"

    @property
    def rows_text(self) -> str:
        """The number of rows, and of conversations if they are fewer, in words."""
        rows = counted(self.rows, "row")
        return rows if self.conversations == self.rows else f"{rows} of {counted(self.conversations, 'conversation')}"

    @property
    def needed_conversations(self) -> int | None:
        """Conversations whose interval is expected to leave the limit outside, at the same difference; None for none.

        The width of an interval falls with the square root of their number.
        """
        low, high, limit = (self.low, self.high, self.limit) if self.measures == "loss" else self._turned
        middle = self.difference if self.measures == "loss" else -self.difference
        reach, distance = (high - middle, limit - middle) if middle <= limit else (middle - low, middle - limit)
        if reach <= 0:
            return max(FEWEST_CONVERSATIONS, self.conversations)
        # the interval may end at the limit, but a difference at the limit itself stays undecided
        times = math.inf if distance <= 0 else reach / distance
        # a product, since a power overflows with an error; and of a manifest's numbers it may be no number
        needed = self.conversations * times * times
        return max(FEWEST_CONVERSATIONS, math.ceil(needed)) if needed <= _MOST_CONVERSATIONS else None

    @property
    def base_text(self) -> str:
        """The value of the base for a table."""
        return self._text(self.base)

    @property
    def adapter_text(self) -> str:
        """The value of the adapter for a table."""
        return self._text(self.adapter)

    @property
    def difference_text(self) -> str:
        """The difference for a table, with its sign."""
        return self._text(self.difference, sign="+")

    @property
    def interval_text(self) -> str:
        """The interval of the difference for a table."""
        return f"{self._text(self.low, sign='+')} to {self._text(self.high, sign='+')}"

    @property
    def limit_text(self) -> str:
        """The difference that is still allowed, for a table."""
        return self._text(self.limit, sign="+") if self.limit else "0"

    def _text(self, value: float, sign: str = "") -> str:
        return f"{value:{sign}.4f}" if self.measures == "loss" else f"{value:{sign}.1%}"

    @property
    def found(self) -> str:
        """The measurement in words, for a finding."""
        unit = " nats a token" if self.measures == "loss" else ""
        return (
            f"{self.name}: {self.adapter_text}{unit}, {self.difference_text} against the base, interval "
            f"{self.interval_text} of {self.rows_text}"
        )

    @property
    def expected(self) -> str:
        """The allowed difference in words."""
        return f"a difference of at {'most' if self.measures == 'loss' else 'least'} {self.limit_text}"


@dataclass(frozen=True, slots=True)
class Gate:
    """The measurements of a gate, and how they were made.

    Attributes:
        lines: The measurements.
        precision: dtype of the base's weights.
        device: `cpu` or `cuda`.
        level: Share of the resamples that an interval holds.
        resamples: Number of resamples of each interval.
        seed: Seed of the resamples.
    """

    lines: Sequence[GateLine]
    precision: str
    device: str
    level: float
    resamples: int
    seed: int

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Gate:
        """Return the gate that `to_json` made; recorded verdicts are not read."""
        how = {name: data[name] for name in cls.__slots__ if name != "lines"}
        return cls(tuple(map(GateLine.from_json, data["lines"])), **how)

    @classmethod
    def recorded_in(cls, manifest: Mapping[str, Any]) -> Gate | None:
        """Return the gate that a valid manifest records, or None."""
        found = (result["gate"] for result in manifest.get("evaluation", ()) if "gate" in result)
        data = next(found, None)
        return None if data is None else cls.from_json(data)

    def to_json(self) -> dict[str, Any]:
        """Return the gate as plain JSON data."""
        how = {name: getattr(self, name) for name in self.__slots__ if name != "lines"}
        return {**how, "fewest_conversations": FEWEST_CONVERSATIONS, "lines": [line.to_json() for line in self.lines]}

    @property
    def verdict(self) -> Verdict:
        """`failed` if any line is, else `undecided` if any line is, else `passed`."""
        verdicts = {line.verdict for line in self.lines}
        order: tuple[Verdict, ...] = ("failed", "undecided", "passed")
        return next(verdict for verdict in order if verdict in verdicts)

    @property
    def how(self) -> str:
        """How the intervals were made, as a sentence."""
        return (
            f"Intervals of {self.level:.0%} by a paired bootstrap over conversations, {self.resamples:,} resamples; "
            f"{self.precision} on {self.device}."
        )

    def reasons(self) -> Iterator[str]:
        """Yield a line for each measurement that did not pass: what failed, or why it is undecided."""
        for line in self.lines:
            if line.verdict == "failed":
                yield f"{line.found}; expected {line.expected}"
            elif line.verdict == "undecided":
                yield f"{line.name}: not checked: {line.reason}"


HEADINGS = ("", "base", "adapter", "difference", "interval", "limit", "conversations", "verdict")
"""The columns of the table of a gate."""


def cells(gate: Gate) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each line of a gate's table, in the columns of `HEADINGS`."""
    for line in gate.lines:
        yield (
            line.name,
            line.base_text,
            line.adapter_text,
            line.difference_text,
            line.interval_text,
            line.limit_text,
            f"{line.conversations:,}",
            line.verdict,
        )


def table_lines(gate: Gate, *, title: str = "adapter") -> list[str]:
    """Return the table of a gate for a terminal.

    Args:
        gate: The gate.
        title: Heading of the second model's column: `adapter` or `merged`.
    """
    rows = [tuple(title if name == "adapter" else name for name in HEADINGS), *cells(gate)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [_padded(row, widths) for row in rows]


def _padded(row: Iterable[str], widths: Sequence[int]) -> str:
    first, *others = zip(row, widths, strict=True)
    return "  ".join([f"{first[0]:<{first[1]}}", *(f"{text:>{width}}" for text, width in others)])
