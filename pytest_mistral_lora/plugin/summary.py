"""The output in the terminal: failed checks by cause, a table of targets, and every check that could not run."""

from __future__ import annotations

import os
import shlex
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.escaping import printable, safe_text
from pytest_mistral_lora.plugin.settings import PluginSettings

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.groups import FindingGroup, FindingGroups
    from pytest_mistral_lora.conformance.outcome import CheckOutcome
    from pytest_mistral_lora.conformance.session import Session

_SUBJECTS_OF_TARGETS = ("dataset", "encoded", "adapter", "merged", "manifest", "transcript", "gguf", "server", "runner")
_TIERS = ("exact", "equivalent", "different")
OUTCOME = "mistral_golden"
"""The attribute of a report that holds the outcome of a check."""


class FailedChecks:
    """Hooks that group failed checks by cause; each check keeps its report, node id and outcome.

    Attributes:
        fails_notes: Whether notes fail.
    """

    def __init__(self, *, fails_notes: bool) -> None:
        self.fails_notes = fails_notes
        self._first: dict[str, str] = {}
        self._reports: list[pytest.TestReport] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Shorten the text of a failed check if an earlier check has shown the same cause in full."""
        # before other plugins: those that write files, such as JUnit's, take the report's text immediately
        outcome = getattr(report, OUTCOME, None)
        if outcome is None or not report.failed or not isinstance(report.longrepr, str):
            return
        from pytest_mistral_lora.conformance.groups import group_findings

        causes = [group for group in group_findings([outcome]) if self._fails(group)]
        if causes:
            self._reports.append(report)
        keys = {group.simplest.cause: group.headline() for group in causes}
        if not causes:  # not checked, if that fails, or stopped by an error
            reason = outcome.not_checked or report.longrepr
            keys = {reason: reason.partition("\n")[0]}
        if all(key in self._first for key in keys):
            lines = [f"{line}\n  same cause as {self._first[key]}" for key, line in keys.items()]
            report.longrepr = "\n".join(lines)
        for key in keys:
            self._first.setdefault(key, report.nodeid)

    def _fails(self, cause: FindingGroup) -> bool:
        finding = cause.simplest
        return (self.fails_notes and not finding.is_newer) or finding.severity == "error"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: Any) -> Generator[None, object, object]:
        """Keep failed checks out of pytest's own lists, and write a line for each cause below them."""
        stats, failed = terminalreporter.stats, terminalreporter.stats.get("failed", [])
        rest = [report for report in failed if report not in self._reports]
        if len(rest) < len(failed):
            stats["failed"] = rest
        try:
            result = yield
        finally:
            if len(rest) < len(failed):
                stats["failed"] = failed
        if not self._shows(terminalreporter) or "f" not in terminalreporter.reportchars:
            return result
        # like pytest, which does not cut lines for a log that is read later
        whole = "CI" in os.environ or "BUILD_NUMBER" in os.environ or terminalreporter.config.option.verbose >= 2
        if not rest and not stats.get("error"):
            terminalreporter.write_sep("=", "short test summary info", cyan=True, bold=True)
        for cause in filter(self._fails, self._causes()):
            write_line(terminalreporter, cause.headline(None if whole else _width(terminalreporter)), red=True)
        return result

    def _shows(self, terminal: Any) -> bool:
        return bool(self._reports) and not getattr(terminal, "no_summary", False)

    def _causes(self) -> FindingGroups:
        from pytest_mistral_lora.conformance.groups import group_findings

        return group_findings(vars(report)[OUTCOME] for report in self._reports)

    def write_findings(self, terminal: Any) -> None:
        """Write each cause in full: its simplest finding, the other checks' names, the command to repeat it."""
        style = terminal.config.option.tbstyle
        if not self._shows(terminal) or style == "no":
            return
        from pytest_mistral_lora.conformance.groups import MOST_WHOLE
        from pytest_mistral_lora.report import line_style

        reruns = {report.nodeid.partition("::")[2]: vars(report)["mistral_rerun"] for report in self._reports}
        terminal.write_sep("=", "Mistral findings")
        causes = [*filter(self._fails, self._causes())]
        most = len(causes) if terminal.config.option.verbose > 0 else MOST_WHOLE
        for number, cause in enumerate(causes):
            if style == "line" or number >= most:
                if style != "line" and number == most:
                    write_line(
                        terminal, f"{counted(len(causes) - most, 'more cause')}, a line each (-v shows them whole):"
                    )
                write_line(terminal, cause.headline(), red=True)
                continue
            terminal.write_sep("_", printable(cause.check, lines=False), red=True, bold=True)
            text = f"{cause.text(_width(terminal))}\n\n{reruns[cause.check]}"
            for line in printable(text).split("\n"):
                write_line(terminal, line, **dict.fromkeys(line_style(line).split(), True))


def _width(terminal: Any) -> int:
    # `_tw` is private; without it, lines are as wide as a common terminal
    return int(terminal._tw.fullwidth) if hasattr(terminal, "_tw") else 80


def write_line(terminal: Any, line: str, **style: bool) -> None:
    """Write a line to pytest's terminal, with control characters of foreign text escaped."""
    terminal.write_line(safe_text(printable(line, lines=False)), **style)


def write_summary(terminal: Any, session: Session, settings: PluginSettings, *, unused: Sequence[Path]) -> None:
    """Write the summary to pytest's terminal.

    Args:
        terminal: pytest's terminal reporter.
        session: The run of the suite.
        settings: The settings of the run.
        unused: Folders of user goldens that no target of this run reads.
    """
    from pytest_mistral_lora.conformance.groups import signs_among
    from pytest_mistral_lora.report import look_at_lines

    terminal.section("Mistral conformance", sep="=")
    outcomes = session.outcomes
    if outcomes:
        from pytest_mistral_lora.report import NOTHING_WAS_JUDGED, basis_lines
        from pytest_mistral_lora.report.tables import outcome_table, statistics_line, statistics_of

        for line in (*session.opening_lines, *outcome_table(outcomes, _width(terminal))):
            write_line(terminal, line)
        figures = (
            f"figures of {name}: {statistics_line(statistics)}" for name, statistics in statistics_of(outcomes).items()
        )
        for line in (*basis_lines(outcomes), *session.known_faults(), *figures):
            write_line(terminal, line)
        if session.nothing_judged:
            write_line(terminal, NOTHING_WAS_JUDGED, red=True)
    ran = dict.fromkeys((outcome.target, outcome.facts.get("ran under")) for outcome in outcomes)
    lines = [*_answer_lines(outcomes), *(f"{target} ran under {versions}" for target, versions in ran if versions)]
    if settings.update:
        lines += _golden_lines(outcomes)
    known = Counter((known.id, known.reason) for outcome in outcomes for known in outcome.known)
    lines += [f"known {name}: {reason} ({counted(count, 'check')})" for (name, reason), count in known.items()]
    for line in lines:
        write_line(terminal, line)
    for cause in session.causes():
        if cause.simplest.severity == "note" and not cause.simplest.is_sign:
            write_line(terminal, f"note {cause.headline()} - {cause.check}", yellow=True)
            write_line(terminal, f"  fix: {cause.simplest.next_step}")
    for line in session.remarks_on_rules:
        write_line(terminal, line, yellow=True)
    for line in _unchecked_lines(session, settings, unused):
        write_line(terminal, line)
    for line in look_at_lines(signs_among(session.causes())):
        write_line(terminal, line, yellow=True)


def write_next(terminal: Any, session: Session) -> None:
    """Write the command to run next, if there is an obvious one."""
    from pytest_mistral_lora.conformance.next_command import next_lines

    for line in next_lines(session):
        write_line(terminal, line, bold=True)


def write_left_out_tests(terminal: Any, folder: Path) -> None:
    """Say that the tests of a folder did not run, if there are any: a run of the suite alone is green without them."""
    from pytest_mistral_lora.starter.own_tests import find_test_files

    config = terminal.config
    files = find_test_files(folder, config.getini("python_files"), config.getini("norecursedirs"))
    if not files:
        return
    which = files[0].relative_to(folder) if len(files) == 1 else counted(len(files), "file")
    command = shlex.join(["pytest", *config.invocation_params.args, "."])
    settings = config.inipath.name if config.inipath else "pytest.ini"
    remedy = f"to run them, too: {command} (or set testpaths in {settings})"
    write_line(terminal, f"your tests ({which}) were not collected; {remedy}", yellow=True)


def write_annotations(terminal: Any, session: Session) -> None:
    """Write an annotation for each cause, and extend the job's summary, for a GitHub workflow."""
    from pytest_mistral_lora.conformance.groups import FILE_WIDTH
    from pytest_mistral_lora.report.github import add_job_summary, annotation_lines
    from pytest_mistral_lora.report.judged import Judged, cases_of

    outcomes = session.outcomes
    causes = [{**cause.to_json(), "text": cause.text(FILE_WIDTH)} for cause in session.causes()]
    terminal.ensure_newline()
    for line in annotation_lines(causes):
        terminal.write_line(line)  # a workflow command, whose values are escaped
    cases = [*cases_of(outcomes)]
    add_job_summary(Judged("pytest --mistral-golden", causes, cases, session.verdict(), known=session.known_faults()))


def _answer_lines(outcomes: Sequence[CheckOutcome]) -> list[str]:
    """Return a line for each adapter whose transcripts were compared: the number of answers in each tier."""
    tiers: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        found = {tier: outcome.facts[tier] for tier in _TIERS if tier in outcome.facts}
        if found and outcome.subject == "transcript":
            tiers.setdefault(outcome.target, Counter()).update(found)
    return [
        f"answers of {target}: " + ", ".join(f"{count[tier]} {tier}" for tier in _TIERS)
        for target, count in tiers.items()
    ]


def _golden_lines(outcomes: Sequence[CheckOutcome]) -> list[str]:
    """Return a line for each recorded golden, and their counts."""
    facts = [outcome.facts for outcome in outcomes if "golden" in outcome.facts]
    lines = [
        f"golden {fact['written']}: {fact['golden']}"
        + (" (no row has this name any more; remove the file if you do not need it)" if fact["orphan"] else "")
        for fact in facts
    ]
    counts = Counter(fact["written"] for fact in facts)
    summary = ", ".join(f"{counts[state]} {state}" for state in ("created", "rewritten", "unchanged"))
    return [*lines, f"goldens: {summary}"]


def _unchecked_lines(session: Session, settings: PluginSettings, unused: Sequence[Path]) -> list[str]:
    """Return the list of everything that this run did not check, so that a green run does not claim more."""
    from pytest_mistral_lora.report import unchecked_lines

    outcomes = session.outcomes
    lines = unchecked_lines(outcomes) or ["not checked:"]
    lines += [f"  {folder}: goldens of no target in this run" for folder in unused]
    lines += [f"  {line}" for line in session.remarks_on_known]
    if session.deselected:
        lines.append(f"  {counted(session.deselected, 'check')} deselected")
    if session.not_run:
        lines.append(f"  {counted(session.not_run, 'check')} not run")
    if not settings.options.train:
        lines.append("  train: left out by --mistral-no-train")
    elif {outcome.facts.get("device") for outcome in outcomes if outcome.subject == "train"} == {"cpu"}:
        lines.append("  train on CUDA: models ran on the CPU")
    seen = {outcome.subject for outcome in outcomes}
    lines.append(f"  {', '.join(name for name in _SUBJECTS_OF_TARGETS if name not in seen)}: no target of that kind")
    return lines
