"""The figures of benchmarks/train.py: medians, ratios, and whether a ratio counts."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

OURS, PLAIN, PADDED, PACKED = "ours", "transformers Trainer, padded", "TRL, padded", "TRL, packed"
SHARED = "ours, share_prefix"

LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}
"""Largest relative difference of a step's loss from the reference's: they train on the same rows in the same order."""
HELD_OUT_TOLERANCE = 0.02
"""Largest relative difference of the held-out loss from the reference's, for what is packed: its batches are others."""

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""What each contestant measured, a mapping for each repetition."""


def figures(rows: Sequence[Mapping[str, Sequence[int]]], in_batch: int) -> dict[str, Any]:
    """Return what the ratios rest on: how long the rows are, and how much a padded batch of them feeds."""
    lengths = [len(row["input_ids"]) for row in rows]
    batches = [lengths[first : first + in_batch] for first in range(0, len(lengths), in_batch)]
    supervised = sum(label != -100 for row in rows for label in row["labels"][1:])
    return {
        "rows": len(rows),
        "tokens": sum(lengths),
        "mean_length": round(statistics.mean(lengths), 1),
        "longest": max(lengths),
        "supervised": round(supervised / sum(lengths), 3),
        "padding_ratio": round(sum(max(batch) * len(batch) for batch in batches) / sum(lengths), 3),
    }


def summarize(runs: Runs, precision: str) -> dict[str, dict[str, Any]]:
    """Return the figures of each; ratios are to TRL padded, or else the plain Trainer, or else ours."""
    reference = next(name for name in (PADDED, PLAIN, OURS) if name in runs)
    return {name: _figures(name, runs, reference, precision) for name in runs}


def _figures(name: str, runs: Runs, reference: str, precision: str) -> dict[str, Any]:
    mine, theirs = runs[name], runs[reference]
    difference, tolerance = _disagreement(name, mine[0], theirs[0], precision)
    return {
        "tokens_per_second": _median(_rate(run, "tokens", "wall") for run in mine),
        "supervised_per_second": _median(_rate(run, "supervised", "wall") for run in mine),
        "memory_mib": _median(run["memory"] / 2**20 for run in mine),
        "reference": reference,
        "ratio": _paired(mine, theirs, "wall"),
        "cpu_ratio": _paired(mine, theirs, "cpu"),
        "memory_ratio": round(_median(run["memory"] for run in mine) / _median(run["memory"] for run in theirs), 3),
        "of_limit": _median(_of_limit(run) for run in mine),
        "losses": [step["loss"] for step in mine[0]["steps"]],
        "held_out_loss": mine[0]["held_out_loss"],
        "difference": difference,
        "tolerance": tolerance,
        "counts": difference <= tolerance,
        "versions": mine[0]["versions"],
    }


def _disagreement(name: str, mine: Mapping[str, Any], theirs: Mapping[str, Any], precision: str) -> tuple[float, float]:
    """Return how far a run is from the reference, relatively, and how far it may be."""
    if name == PACKED:
        return abs(mine["held_out_loss"] / theirs["held_out_loss"] - 1), HELD_OUT_TOLERANCE
    pairs = zip(mine["steps"], theirs["steps"], strict=True)
    away = [abs(one["loss"] / other["loss"] - 1) for one, other in pairs]
    return (math.nan if any(map(math.isnan, away)) else max(away)), LOSS_TOLERANCE[precision]


def _rate(run: Mapping[str, Any], what: str, clock: str) -> float:
    """Return a rate without the first step, in which memory is taken and kernels are chosen."""
    steps = run["steps"][1:]
    return sum(step[what] for step in steps) / sum(step[clock] for step in steps)


def _paired(mine: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], clock: str) -> float:
    """Return the median over repetitions of the ratio within one: a busy moment hits both."""
    pairs = zip(mine, theirs, strict=True)
    return _median(_rate(one, "tokens", clock) / _rate(other, "tokens", clock) for one, other in pairs)


def _of_limit(run: Mapping[str, Any]) -> float:
    needed = run["needed_flops"] / sum(step["tokens"] for step in run["steps"])
    return needed * _rate(run, "tokens", "wall") / run["possible_flops"]


def _median(values: Any) -> float:
    return round(statistics.median(values), 3)


def show(found: Mapping[str, Any]) -> None:
    """Print what a contest found."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    rows, results = found["rows"], found["results"]
    console.print(
        f"{found['title']}: {rows['rows']} rows, {rows['mean_length']} tokens on average, {rows['longest']} at most, "
        f"{rows['supervised']:.0%} supervised; padded, {rows['padding_ratio']} tokens are fed for each real one"
    )
    against = f"times {results[OURS]['reference']}"
    table = _table("run", "tokens/s", "supervised/s", "peak MiB", against, "by CPU time", "memory", "of the limit")
    for name, one in results.items():
        table.add_row(name, *_cells(one))
    console.print(table)
    curves = _table("run", "difference", "tolerance", "held-out loss", "loss of each step")
    for name, one in results.items():
        losses = " ".join(f"{loss:.3f}" for loss in one["losses"])
        away = (f"{one['difference']:.1e}", f"{one['tolerance']:.0e}")
        curves.add_row(name, *away, f"{one['held_out_loss']:.4f}", losses)
    console.print(curves)


def _table(first: str, *others: str) -> Table:
    table = Table(first, box=box.MARKDOWN)
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _cells(one: Mapping[str, Any]) -> list[str]:
    ratios = [f"{one['ratio']:.2f}", f"{one['cpu_ratio']:.2f}", f"{one['memory_ratio']:.2f}"]
    if not one["counts"]:
        ratios = ["does not count"] * len(ratios)
    speeds = [f"{one['tokens_per_second']:,.1f}", f"{one['supervised_per_second']:,.1f}", f"{one['memory_mib']:,.0f}"]
    return [*speeds, *ratios, f"{one['of_limit']:.0%}"]
