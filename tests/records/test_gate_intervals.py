"""Laws of the gate's interval and of its verdicts, and how often the interval holds the true value."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_mistral_lora.records.bootstrap import RESAMPLES, paired_interval
from pytest_mistral_lora.records.gate import FEWEST_CONVERSATIONS, Gate, GateLine, Verdict, table_lines

SCRIPTS = Path(__file__).parents[2] / "scripts"

SUMS = st.floats(-50, 50, allow_subnormal=False).map(lambda value: round(value, 6))
PAIRS = st.lists(st.tuples(SUMS, st.integers(1, 500)), min_size=1, max_size=60)
Pairs = list[tuple[float, int]]


def interval(pairs: Pairs, **how: Any) -> tuple[float, float]:
    found = paired_interval([one for one, _ in pairs], [one for _, one in pairs], **{"resamples": 200, **how})
    return found.low, found.high


@given(PAIRS, st.randoms(use_true_random=False), st.integers(0, 5))
def test_the_order_of_the_rows_changes_nothing(pairs: Pairs, random: Any, seed: int) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert interval(pairs, seed=seed) == interval(shuffled, seed=seed)


@given(PAIRS)
def test_the_interval_is_between_the_lowest_and_the_highest_row(pairs: Pairs) -> None:
    low, high = interval(pairs)
    ratios = [one / count for one, count in pairs]
    assert min(ratios) - 1e-9 <= low <= high <= max(ratios) + 1e-9


@given(PAIRS, st.sampled_from([0.125, 2.0, 1024.0]))
def test_another_unit_scales_the_interval(pairs: Pairs, factor: float) -> None:
    low, high = interval(pairs)
    # powers of two scale without rounding
    assert interval([(factor * one, count) for one, count in pairs]) == (factor * low, factor * high)


@given(PAIRS, st.floats(-3, 3))
def test_the_same_difference_in_each_token_moves_the_interval(pairs: Pairs, moved: float) -> None:
    # with tokens alike, the rows keep their order, and the same draws take the same rows
    alike = [(one, 20) for one, _ in pairs]
    low, high = interval(alike)
    shifted = [(one + moved * count, count) for one, count in alike]
    assert interval(shifted) == pytest.approx((low + moved, high + moved), abs=1e-9)


@given(st.integers(1, 60), SUMS)
def test_rows_that_are_alike_have_an_interval_without_width(rows: int, one: float) -> None:
    assert interval([(one, 10)] * rows) == pytest.approx((one / 10, one / 10), abs=1e-12)


def test_it_is_paired() -> None:
    """Both models' losses vary by far more from row to row than from model to model."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 200, 60)
    base = tokens * generator.uniform(0.1, 8.0, 60)
    adapter = base - 0.1 * tokens
    low, high = paired_interval(adapter - base, tokens)
    assert (low, high) == pytest.approx((-0.1, -0.1))
    apart = paired_interval(base, tokens)
    assert apart.high - apart.low > 0.5


def test_the_seed_and_the_resamples_decide_the_numbers() -> None:
    pairs = [(float(one), 1 + one % 7) for one in range(50)]
    assert interval(pairs, resamples=RESAMPLES) == interval(pairs, resamples=RESAMPLES)
    assert interval(pairs, seed=1) != interval(pairs, seed=2)


def test_many_rows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_mistral_lora.records import bootstrap

    pairs = [(float(one), 1 + one % 7) for one in range(50)]
    whole = interval(pairs)
    monkeypatch.setattr(bootstrap, "_MOST_DRAWS", 120)
    assert interval(pairs) == whole


@pytest.mark.parametrize(
    ("sums", "counts"), [([], []), ([1.0], [1, 2]), ([1.0], [0]), ([[1.0]], [[1]])], ids=["none", "more", "0", "2-d"]
)
def test_rows_without_a_token_have_no_interval(sums: Any, counts: Any) -> None:
    with pytest.raises(ValueError, match="weights > 0"):
        paired_interval(sums, counts)


def line(
    low: float, high: float, *, limit: float = 0.0, rows: int = 100, middle: float | None = None, measures: Any = "loss"
) -> GateLine:
    difference = (low + high) / 2 if middle is None else middle
    return GateLine(
        name="held-out loss",
        measures=measures,
        base=1.0,
        adapter=1.0 + difference,
        difference=difference,
        low=low,
        high=high,
        limit=limit,
        rows=rows,
        conversations=rows,
        tokens=5 * rows,
    )


@pytest.mark.parametrize(
    ("low", "high", "limit", "of_loss", "of_rate"),
    [
        (-0.2, -0.1, 0.0, "passed", "failed"),
        (0.1, 0.2, 0.0, "failed", "passed"),
        (-0.1, 0.2, 0.0, "undecided", "undecided"),
        (0.0, 0.0, 0.0, "passed", "passed"),
        (0.01, 0.05, 0.05, "passed", "undecided"),
        (0.05, 0.06, 0.05, "undecided", "passed"),
        (0.06, 0.07, 0.05, "failed", "passed"),
    ],
)
def test_a_verdict_needs_the_whole_interval(
    low: float, high: float, limit: float, of_loss: Verdict, of_rate: Verdict
) -> None:
    assert line(low, high, limit=limit).verdict == of_loss
    assert line(low, high, limit=limit, measures="rate").verdict == of_rate


@given(st.integers(1, FEWEST_CONVERSATIONS - 1), st.floats(-5, 5), st.floats(0, 5), st.sampled_from(["loss", "rate"]))
def test_few_rows_are_undecided_whatever_the_interval_says(rows: int, low: float, width: float, measures: Any) -> None:
    few = line(low, low + width, rows=rows, measures=measures)
    assert few.verdict == "undecided"
    assert str(FEWEST_CONVERSATIONS) in few.reason
    assert few.needed_conversations is None or few.needed_conversations >= FEWEST_CONVERSATIONS


@given(st.floats(-5, 5), st.floats(1e-3, 5), st.floats(0, 1), st.sampled_from(["loss", "rate"]))
@settings(max_examples=200)
def test_the_needed_conversations_would_leave_the_limit_outside(
    low: float, width: float, part: float, measures: Any
) -> None:
    found = line(low, low + width, middle=low + part * width, measures=measures)
    if found.verdict != "undecided" or found.needed_conversations is None:
        return
    shrink = (found.rows / found.needed_conversations) ** 0.5
    then = line(
        found.difference - shrink * (found.difference - found.low),
        found.difference + shrink * (found.high - found.difference),
        middle=found.difference,
        rows=found.needed_conversations,
        measures=measures,
    )
    # the recorded numbers have six digits
    edge = min(abs(then.low), abs(then.high))
    assert then.verdict != "undecided" or edge < 1e-5


def test_a_difference_at_the_limit_needs_more_rows_than_there_are() -> None:
    found = line(-0.1, 0.1, middle=0.0)
    assert found.needed_conversations is None
    assert "no number of them" in found.reason


@pytest.mark.parametrize("end", [1e308, 1.7e308])
def test_numbers_that_nobody_measured_need_no_number_of_rows(end: float) -> None:
    found = line(-end, end, middle=1e-6, rows=2**64 - 1)
    assert found.verdict == "undecided"
    assert found.needed_conversations is None
    assert found.reason


def test_a_gate_fails_before_it_is_undecided() -> None:
    passed, failed, undecided = line(-0.2, -0.1), line(0.1, 0.2), line(-0.1, 0.1)
    how: Any = {"precision": "fp32", "device": "cpu", "level": 0.95, "resamples": 10, "seed": 0}
    assert Gate((passed, undecided, failed), **how).verdict == "failed"
    assert Gate((passed, undecided), **how).verdict == "undecided"
    gate = Gate((passed, passed), **how)
    assert gate.verdict == "passed"
    assert Gate.from_json(gate.to_json()) == gate
    # a verdict that somebody wrote by hand is not read
    data = Gate((failed,), **how).to_json()
    data["lines"][0]["verdict"] = "passed"
    assert Gate.from_json(data).verdict == "failed"


def test_the_table_has_aligned_columns() -> None:
    how: Any = {"precision": "fp32", "device": "cpu", "level": 0.95, "resamples": 10, "seed": 0}
    header, first, second = table_lines(
        Gate((line(-0.2, -0.1), line(0.1, 0.2, measures="rate")), **how), title="merged"
    )
    assert header.split() == ["base", "merged", "difference", "interval", "limit", "conversations", "verdict"]
    assert len(header) == len(first) == len(second)
    assert "+10.0% to +20.0%" in second


def test_a_name_cannot_break_the_table() -> None:
    named = GateLine("rate of regex:\u202ea\nb|c", "rate", 1, 1, 0, 0, 0, 0, 50, 50)
    assert named.name == "rate of regex:\\u202ea\\nb|c"
    assert GateLine.from_json(named.to_json()) == named


def test_the_fewest_rows_are_those_that_the_script_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gate_coverage

    found = {
        population.title: (
            gate_coverage.coverage(population.draw, FEWEST_CONVERSATIONS, trials=600, resamples=400),
            gate_coverage.coverage(population.draw, 4, trials=300, resamples=400),
        )
        for population in gate_coverage.POPULATIONS
    }
    # the bounds of the docstring of FEWEST_CONVERSATIONS, with the error of so few trials
    assert all(enough[0] > 0.83 and enough[1] < 0.055 for enough, _ in found.values()), found
    assert min(few[0] for _, few in found.values()) < 0.5
    sys.modules.pop("gate_coverage")
