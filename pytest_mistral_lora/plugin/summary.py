"""The terminal summary: one table of targets and subjects, and what was not checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.plugin.settings import PluginSettings

_SUBJECTS_OF_TARGETS = ("dataset", "encoded", "adapter", "manifest", "transcript", "runner")
_TIERS = ("exact", "equivalent", "different")


def write(
    terminal: Any,
    outcomes: list[dict[str, Any]],
    settings: PluginSettings,
    *,
    unused: Sequence[Path],
    deselected: int,
    not_run: int,
) -> None:
    """Write the summary to pytest's terminal."""
    terminal.section("Mistral conformance", sep="=")
    if outcomes:
        from pytest_mistral_lora.report.session import outcome_table

        for line in outcome_table(outcomes, terminal._tw.fullwidth if hasattr(terminal, "_tw") else 80):
            terminal.write_line(line)
    for line in (*_answers(outcomes), *_ran_under(outcomes), *(_written(outcomes) if settings.update else ())):
        terminal.write_line(line)
    for line in _known(outcomes):
        terminal.write_line(line)
    for line in _notes(outcomes):
        terminal.write_line(line, yellow=True)
    for line in _not_checked(outcomes, settings, unused, deselected, not_run):
        terminal.write_line(line)


def _answers(outcomes: list[dict[str, Any]]) -> list[str]:
    """Return a line for each adapter that was asked: how many answers are in which tier."""
    tiers: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        found = {tier: outcome["facts"][tier] for tier in _TIERS if tier in outcome["facts"]}
        if found and outcome["subject"] == "transcript":
            tiers.setdefault(outcome["target"], Counter()).update(found)
    return [
        f"answers of {target}: " + ", ".join(f"{count[tier]} {tier}" for tier in _TIERS)
        for target, count in tiers.items()
    ]


def _ran_under(outcomes: list[dict[str, Any]]) -> list[str]:
    """Return a line for each runner: the versions that it ran under."""
    ran = ((outcome["target"], outcome["facts"].get("ran under")) for outcome in outcomes)
    return [f"{target} ran under {versions}" for target, versions in dict.fromkeys(ran) if versions]


def _written(outcomes: list[dict[str, Any]]) -> list[str]:
    """Return a line for each golden that was recorded, and one that counts them."""
    facts = [outcome["facts"] for outcome in outcomes if "golden" in outcome["facts"]]
    lines = [
        f"golden {fact['written']}: {fact['golden']}"
        + (" (no row has this name any more; remove the file if it is not wanted)" if fact["orphan"] else "")
        for fact in facts
    ]
    counts = Counter(fact["written"] for fact in facts)
    summary = ", ".join(f"{counts[state]} {state}" for state in ("created", "rewritten", "unchanged"))
    return [*lines, f"goldens: {summary}"]


def _known(outcomes: list[dict[str, Any]]) -> list[str]:
    seen = Counter((one["id"], one["reason"]) for outcome in outcomes for one in outcome["known"])
    return [f"known {name}: {reason} ({_checks(count)})" for (name, reason), count in seen.items()]


def _notes(outcomes: list[dict[str, Any]]) -> list[str]:
    notes = [(o["nodeid"], f) for o in outcomes for f in o["findings"] if f["severity"] == "note"]
    return [f"note {finding['rule']} {nodeid}: {finding['found']}" for nodeid, finding in notes]


def _not_checked(
    outcomes: list[dict[str, Any]], settings: PluginSettings, unused: Sequence[Path], deselected: int, not_run: int
) -> list[str]:
    lines = ["not checked:"]
    reasons = Counter((o["target"], o["not_checked"]) for o in outcomes if o["not_checked"])
    lines += [f"  {target}: {reason} ({count})" for (target, reason), count in reasons.items()]
    lines += [f"  {folder}: goldens of no target in this run" for folder in unused]
    if deselected:
        lines.append(f"  {_checks(deselected)} deselected")
    if not_run:
        lines.append(f"  {_checks(not_run)} not run")
    if settings.skip_training:
        lines.append("  train: left out by --mistral-golden-skip-training")
    elif {o["facts"].get("device") for o in outcomes if o["subject"] == "train"} == {"cpu"}:
        lines.append("  train on CUDA: models ran on the CPU")
    seen = {outcome["subject"] for outcome in outcomes}
    lines.append(f"  {', '.join(name for name in _SUBJECTS_OF_TARGETS if name not in seen)}: no target of that kind")
    return lines


def _checks(count: int) -> str:
    return f"{count} check{'' if count == 1 else 's'}"
