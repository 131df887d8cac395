"""The summary in the terminal: one table of targets and subjects, and every check that could not run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pytest_mistral_lora.plugin.settings import PluginSettings

_SUBJECTS_OF_TARGETS = ("dataset", "encoded", "adapter", "merged", "manifest", "transcript", "gguf", "server", "runner")
_TIERS = ("exact", "equivalent", "different")


def write_summary(
    terminal: Any,
    outcomes: list[dict[str, Any]],
    settings: PluginSettings,
    *,
    unused: Sequence[Path],
    deselected: int,
    not_run: int,
) -> None:
    """Write the summary to pytest's terminal.

    Args:
        terminal: pytest's terminal reporter.
        outcomes: One record for each check that ran.
        settings: The settings of the run.
        unused: Folders of user goldens that no target of this run reads.
        deselected: Number of checks that were left out by `-k`, `-m` or `--lf`.
        not_run: Number of checks that were chosen and did not run.
    """
    terminal.section("Mistral conformance", sep="=")
    if outcomes:
        from pytest_mistral_lora.report import basis_lines, nothing_was_judged, outcome_table
        from pytest_mistral_lora.report.statistics import statistics_line, statistics_of

        # `_tw` is private; without it, the table is as wide as a common terminal
        for line in outcome_table(outcomes, terminal._tw.fullwidth if hasattr(terminal, "_tw") else 80):
            terminal.write_line(line)
        figures = (f"figures of {name}: {statistics_line(one)}" for name, one in statistics_of(outcomes).items())
        for line in (*basis_lines(outcomes), *figures):
            terminal.write_line(line)
        if nothing_was_judged(outcomes):
            terminal.write_line("No check could judge anything, so that this run is no pass.", red=True)
    ran = dict.fromkeys((one["target"], one["facts"].get("ran under")) for one in outcomes)
    lines = [*_answer_lines(outcomes), *(f"{target} ran under {versions}" for target, versions in ran if versions)]
    if settings.update:
        lines += _golden_lines(outcomes)
    known = Counter((known["id"], known["reason"]) for one in outcomes for known in one["known"])
    lines += [f"known {name}: {reason} ({_counted_checks(count)})" for (name, reason), count in known.items()]
    for line in lines:
        terminal.write_line(line)
    if any(one["findings"] for one in outcomes):
        from pytest_mistral_lora.conformance.groups import group_findings

        for cause in group_findings(outcomes):
            if cause.simplest.severity == "note":
                terminal.write_line(f"note {cause.headline()} - {cause.check}", yellow=True)
    for line in _unchecked_lines(outcomes, settings, unused, deselected, not_run):
        terminal.write_line(line)


def write_annotations(terminal: Any, outcomes: list[dict[str, Any]]) -> None:
    """Write an annotation for each cause, and add to the summary of the job, for a workflow of GitHub."""
    from pytest_mistral_lora.conformance.groups import FILE_WIDTH, group_findings
    from pytest_mistral_lora.report import verdict_line
    from pytest_mistral_lora.report.github import add_job_summary, annotation_lines
    from pytest_mistral_lora.report.judged import Judged, cases_of

    groups = group_findings(outcomes)
    causes = [{**cause.to_json(), "text": cause.text(FILE_WIDTH)} for cause in groups]
    terminal.ensure_newline()
    for line in annotation_lines(causes):
        terminal.write_line(line)
    cases = [*cases_of(outcomes, [""] * len(outcomes))]
    verdict = verdict_line(outcomes, [one.count for one in groups])
    add_job_summary(Judged("pytest --mistral-golden", causes, cases, verdict))


def _answer_lines(outcomes: list[dict[str, Any]]) -> list[str]:
    """Return a line for each adapter whose transcripts were compared: the number of answers in each tier."""
    tiers: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        found = {tier: outcome["facts"][tier] for tier in _TIERS if tier in outcome["facts"]}
        if found and outcome["subject"] == "transcript":
            tiers.setdefault(outcome["target"], Counter()).update(found)
    return [
        f"answers of {target}: " + ", ".join(f"{count[tier]} {tier}" for tier in _TIERS)
        for target, count in tiers.items()
    ]


def _golden_lines(outcomes: list[dict[str, Any]]) -> list[str]:
    """Return a line for each golden that was recorded, and their counts."""
    facts = [outcome["facts"] for outcome in outcomes if "golden" in outcome["facts"]]
    lines = [
        f"golden {fact['written']}: {fact['golden']}"
        + (" (no row has this name any more; remove the file if you do not need it)" if fact["orphan"] else "")
        for fact in facts
    ]
    counts = Counter(fact["written"] for fact in facts)
    summary = ", ".join(f"{counts[state]} {state}" for state in ("created", "rewritten", "unchanged"))
    return [*lines, f"goldens: {summary}"]


def _unchecked_lines(
    outcomes: list[dict[str, Any]], settings: PluginSettings, unused: Sequence[Path], deselected: int, not_run: int
) -> list[str]:
    """Return the list of everything that this run did not check, so that a green run claims no more than it saw."""
    from pytest_mistral_lora.report import unchecked_lines

    lines = unchecked_lines(outcomes) or ["not checked:"]
    lines += [f"  {folder}: goldens of no target in this run" for folder in unused]
    if deselected:
        lines.append(f"  {_counted_checks(deselected)} deselected")
    if not_run:
        lines.append(f"  {_counted_checks(not_run)} not run")
    if settings.skip_training:
        lines.append("  train: left out by --mistral-golden-skip-training")
    elif {one["facts"].get("device") for one in outcomes if one["subject"] == "train"} == {"cpu"}:
        lines.append("  train on CUDA: models ran on the CPU")
    seen = {outcome["subject"] for outcome in outcomes}
    lines.append(f"  {', '.join(name for name in _SUBJECTS_OF_TARGETS if name not in seen)}: no target of that kind")
    return lines


def _counted_checks(count: int) -> str:
    return f"{count} check{'' if count == 1 else 's'}"
