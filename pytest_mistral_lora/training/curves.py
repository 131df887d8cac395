"""The curves and answers of a run as a page that loads nothing else: `training.html`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.gate import HEADINGS, Gate, GateLine, cells
from pytest_mistral_lora.training.callbacks import FORMAT, skipped_steps
from pytest_mistral_lora.training.generate.record import AnsweredRow

PAGE = "training.html"
"""File of the page: in the adapter's folder, and in the work folder while the run goes on."""

_MOST_POINTS = 400
"""Most points of a line: a screen has few more columns."""

_MOST_DOTS = 40
"""Most points that are marked one by one: a line of a single point would be invisible."""

_MOST_ROWS = 500
_KEYS = ("loss", "eval_loss", "grad_norm", "learning_rate")
_RATES = "Format of the answers"
_TRAINING_LOSS = "training loss"
_SECONDS = 10.0
"""Seconds from one page to the next."""

_SHARE = 0.01
"""Largest share of the run's time that pages may take."""

_WIDTH, _HEIGHT = 1000, 300
"""Units of a chart's drawing, which the page stretches to its own width."""

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: Its name in the legend.
        points: Step and value of each point, in order.
    """

    name: str
    points: Points


@dataclass(frozen=True)
class Chart:
    """Curves over the same steps, ready to be drawn.

    Attributes:
        title: Its heading.
        unit: Unit of the values.
        curves: Its lines, the first one as a solid line.
        steps: Steps of the whole run, at the right end.
        bounds: Values that the chart always shows.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    steps: int
    bounds: Sequence[float] = ()

    @cached_property
    def ticks(self) -> list[float]:
        """The values with a line of their own, from the lowest to the highest; all points are between them."""
        values = [*self.bounds, *(value for curve in self.curves for _, value in curve.points)]
        return round_ticks(min(values), max(values))

    @property
    def step_ticks(self) -> list[float]:
        """The steps below the chart."""
        return [tick for tick in round_ticks(0, self.steps) if tick <= self.steps and tick == int(tick)]

    def across(self, step: float) -> float:
        """Return the place of a step, in percent from the left."""
        return round(100 * step / max(1, self.steps), 3)

    def down(self, value: float) -> float:
        """Return the place of a value, in percent from the top."""
        low, high = self.ticks[0], self.ticks[-1]
        return round(100 * (high - value) / (high - low), 3)

    def path(self, curve: Curve) -> str:
        """Return a curve as the commands of an SVG path."""
        return "M" + "L".join(self._place(point) for point in thinned(curve.points))

    def dots(self, curve: Curve) -> str:
        """Return the points of a short curve as an SVG path of lines of length zero; their round ends are visible."""
        few = curve.points if len(curve.points) <= _MOST_DOTS else []
        return "".join(f"M{self._place(point)}h0" for point in few)

    def _place(self, point: tuple[float, float]) -> str:
        step, value = point
        return f"{round(self.across(step) / 100 * _WIDTH, 1):g} {round(self.down(value) / 100 * _HEIGHT, 1):g}"

    @property
    def words(self) -> str:
        """The curves in words, for those who do not see them."""
        texts = []
        for curve in self.curves:
            first, last = curve.points[0][1], curve.points[-1][1]
            lowest, highest = min(value for _, value in curve.points), max(value for _, value in curve.points)
            texts.append(
                f"{curve.name}: first {first:.4g}, last {last:.4g}, lowest {lowest:.4g}, highest {highest:.4g}"
            )
        return "; ".join(texts)


@dataclass(frozen=True)
class IntervalMark:
    """The interval of a gate's line, ready to be drawn: the limit is in the middle, and right of it is worse.

    Each line has a scale of its own, because a difference of a loss and one of a rate have other units.

    Attributes:
        line: The line.
    """

    line: GateLine

    def across(self, value: float) -> float:
        """Return the place of a difference, from 0 at the left to `_WIDTH`."""
        line = self.line
        # 1.25: an interval does not touch the edge, and its ends are seen
        reach = 1.25 * max(abs(end - line.limit) for end in (line.low, line.high, line.difference)) or 1.0
        worse = (value - line.limit) * (1 if line.measures == "loss" else -1)
        return round(_WIDTH / 2 * (1 + worse / reach), 1)

    @property
    def ends(self) -> tuple[float, float]:
        """The places of the interval's ends, the left one first."""
        first, last = sorted(map(self.across, (self.line.low, self.line.high)))
        return first, last

    @property
    def words(self) -> str:
        """The interval in words, for those who do not see it."""
        line = self.line
        return f"{line.name}: difference {line.difference_text}, interval {line.interval_text}, limit {line.limit_text}"


def round_ticks(low: float, high: float) -> list[float]:
    """Return three to seven round numbers at equal distances, the first not above `low`, the last not below `high`."""
    # a curve that is level is drawn in the middle
    spread = (high - low) or abs(high) or 1.0
    low, high = (low, high) if high > low else (low - spread / 2, high + spread / 2)
    power = 10 ** math.floor(math.log10(spread / 4))
    size = next(power * factor for factor in (1, 2, 5, 10) if power * factor * 5 >= spread)
    # multiplied, not added: sums of 0.1 would show their rounding
    return [float(f"{size * n:.12g}") for n in range(math.floor(low / size), math.ceil(high / size) + 1)]


def thinned(points: Points) -> Points:
    """Return at most `_MOST_POINTS` points: for a long curve, the lowest and highest of each part, so peaks stay."""
    if len(points) <= _MOST_POINTS:
        return points
    size = -(-2 * len(points) // _MOST_POINTS)
    parts = (points[start : start + size] for start in range(0, len(points), size))
    ends = ((min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])) for part in parts)
    return [point for pair in ends for point in sorted(set(pair))]


def charts(log: Sequence[Mapping[str, Any]], steps: int) -> list[Chart]:
    """Return the charts of a training log; charts without a point are left out.

    Args:
        log: The lines of the log, each with `step`.
        steps: Steps of the whole run.
    """

    def curve(key: str, name: str) -> Curve:
        return Curve(name, [(line["step"], line[key]) for line in log if math.isfinite(line.get(key, math.nan))])

    rates = sorted({key for line in log for key in line if key.startswith(FORMAT)})
    found = [
        ("Loss", "nats a supervised token", [curve("loss", "training"), curve("eval_loss", "held-out rows")]),
        (_RATES, "share that passes", [curve(key, key.removeprefix(FORMAT)) for key in rates]),
        ("Gradient norm", "L2, before clipping", [curve("grad_norm", "gradient norm")]),
        ("Learning rate", "", [curve("learning_rate", "learning rate")]),
    ]
    drawn = [(title, unit, [curve for curve in curves if curve.points]) for title, unit, curves in found]
    return [
        # a share of 0.9 must look near 1
        Chart(title, unit, curves, steps, (0.0, 1.0) if title == _RATES else ())
        for title, unit, curves in drawn
        if curves
    ]


def training_page(
    log: Sequence[Mapping[str, Any]],
    steps: int,
    facts: Mapping[str, str],
    answered: Sequence[AnsweredRow] = (),
    gate: Gate | None = None,
) -> str:
    """Return the page of a run: equal runs have equal pages, since the log has no times.

    Args:
        log: The lines of the training log.
        steps: Steps of the whole run.
        facts: The facts at its head, by name.
        answered: The rows that the model answered during the run.
        gate: The comparison of base and adapter; None without it.
    """
    made = max((line["step"] for line in log), default=0)
    state = {"steps": f"{made:,}" if made == steps else f"{made:,} of {steps:,}: the run is not finished"}
    losses = _first_and_last(log)
    title = f"Adapter on {facts['base'].partition(',')[0]}"
    if _TRAINING_LOSS in losses:
        title += f": loss {losses[_TRAINING_LOSS]}"
    skipped = len(skipped_steps(log))
    state |= {"skipped because fp16 overflowed": f"{skipped:,}"} if skipped else {}
    keys = {key for line in log for key in line} - {"step", "epoch"}
    # sorted: the log of a resumed run has its keys in another order
    names = [*(key for key in _KEYS if key in keys), *sorted(keys.difference(_KEYS))]
    every = -(-len(log) // _MOST_ROWS)
    return str(
        _template().render(
            charts=charts(log, steps),
            title=title,
            facts={**facts, **losses, **state},
            names=names,
            rows=log[::every] if every else [],
            every=every,
            width=_WIDTH,
            height=_HEIGHT,
            answered=answered,
            gate=gate,
            headings=HEADINGS[1:],
            marks=[] if gate is None else list(map(IntervalMark, gate.lines)),
            cells=[] if gate is None else list(cells(gate)),
        )
    )


def failed_checks(answer: Mapping[str, Any]) -> str:
    """Return the format checks that an answer fails, each with its reason; empty if it passes all."""
    return "; ".join(f"{name}: {reason}" for name, reason in answer["checks"].items() if reason != "passed")


def _first_and_last(log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the first and the last training loss and held-out loss, `4 → 1`; a loss without a value is left out."""
    found = {}
    for key, name in (("loss", _TRAINING_LOSS), ("eval_loss", "held-out loss")):
        values = [line[key] for line in log if key in line]
        if values:
            found[name] = " → ".join(short(value) for value in (values[0], *values[1:][-1:]))
    return found


def short(value: float) -> str:
    """Return a number in few characters: `0.25`, `1.5e-4`."""
    if value and abs(value) < 1e-3:
        digits, _, power = f"{value:.3e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:.5g}"


@cache
def _template() -> Any:
    from jinja2 import Environment, StrictUndefined

    source = files("pytest_mistral_lora.training").joinpath("training.html.jinja").read_text(encoding="utf-8")
    # the name of a base is data
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"short": short, "printable": printable, "failed_checks": failed_checks}
    return environment.from_string(source)


class WriteCurves(TrainerCallback):
    """Writes the page into the work folder during a run, and when it stops early, in the main process.

    The log is the Trainer's: a resumed run continues the log of its checkpoint, so no step appears twice.
    """

    def __init__(
        self,
        file: Path,
        facts: Mapping[str, str],
        answered: Callable[[], Sequence[AnsweredRow]] = tuple,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Make the callback.

        Args:
            file: The page.
            facts: As for `training_page`.
            answered: Returns the rows that are answered so far.
            clock: Returns seconds.
        """
        self._file, self._facts, self._answered, self._clock = file, facts, answered, clock
        self._due = clock() + _SECONDS

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the page if the last one is old enough."""
        begin = self._clock()
        if state.is_world_process_zero and begin >= self._due:
            self._write(state)
            # a page that takes long is written seldom
            self._due = self._clock() + max(_SECONDS, (self._clock() - begin) / _SHARE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the page of a run that was stopped; the page of a finished run is in the adapter's folder."""
        if state.is_world_process_zero and state.global_step < state.max_steps:
            self._write(state)

    def _write(self, state: Any) -> None:
        write_text(self._file, training_page(state.log_history, state.max_steps, self._facts, self._answered()))
