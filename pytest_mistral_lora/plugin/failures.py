"""Failed checks in pytest's output: one text and one line for each cause, however many checks it fails."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.groups import FindingGroup, FindingGroups


class FailedChecks:
    """Hooks that group failed checks by cause; each keeps its own report, node id and outcome.

    Attributes:
        strict: Whether notes fail, too.
    """

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._first: dict[str, str] = {}
        self._reports: list[pytest.TestReport] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Shorten the text of a check that fails for a cause that an earlier check has shown whole."""
        # first of all: the plugins that write files, such as JUnit's, take the text of the report at once
        data = getattr(report, "mistral_golden", None)
        if data is None or not report.failed or not isinstance(report.longrepr, str):
            return
        from pytest_mistral_lora.conformance.groups import group_findings

        causes = [one for one in group_findings([data]) if self._fails(one)]
        if causes:
            self._reports.append(report)
        keys = {one.simplest.cause: one.headline() for one in causes}
        if not causes:  # strict, and not checked; or an error that stopped the check
            reason = data["not_checked"] or report.longrepr
            keys = {reason: reason.partition("\n")[0]}
        if all(key in self._first for key in keys):
            lines = [f"{line}\n  same cause as {self._first[key]}" for key, line in keys.items()]
            report.longrepr = "\n".join(lines)
        for key in keys:
            self._first.setdefault(key, report.nodeid)

    def _fails(self, cause: FindingGroup) -> bool:
        return self.strict or cause.simplest.severity == "error"

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
        if self._shows(terminalreporter) and "f" in terminalreporter.reportchars:
            from pytest_mistral_lora.report.github import commands_stopped

            with commands_stopped(terminalreporter.write_line):
                self._write_short_lines(terminalreporter, beside_others=bool(rest or stats.get("error")))
        return result

    def _shows(self, terminal: Any) -> bool:
        return bool(self._reports) and not getattr(terminal, "no_summary", False)

    def _causes(self) -> FindingGroups:
        from pytest_mistral_lora.conformance.groups import group_findings

        return group_findings(vars(report)["mistral_golden"] for report in self._reports)

    def write_findings(self, terminal: Any) -> None:
        """Write each cause whole: its simplest finding, the names of the others, and the command that repeats it."""
        style = terminal.config.option.tbstyle
        if not self._shows(terminal) or style == "no":
            return
        from pytest_mistral_lora.report import line_style

        reruns = {one.nodeid.partition("::")[2]: vars(one)["mistral_rerun"] for one in self._reports}
        terminal.write_sep("=", "Mistral findings")
        for cause in filter(self._fails, self._causes()):
            if style == "line":
                terminal.write_line(cause.headline(), red=True)
                continue
            terminal.write_sep("_", cause.check, red=True, bold=True)
            text = f"{cause.text(_width(terminal))}\n\n{reruns[cause.check]}"
            for line in text.splitlines():
                terminal.write_line(line, **dict.fromkeys(line_style(line).split(), True))

    def _write_short_lines(self, terminal: Any, *, beside_others: bool) -> None:
        if not beside_others:
            terminal.write_sep("=", "short test summary info", cyan=True, bold=True)
        # like pytest, which cuts no line if a person reads it later, in a log
        whole = "CI" in os.environ or "BUILD_NUMBER" in os.environ or terminal.config.option.verbose >= 2
        for cause in filter(self._fails, self._causes()):
            terminal.write_line(cause.headline(None if whole else _width(terminal)), red=True)


def _width(terminal: Any) -> int:
    # `_tw` is private; without it, lines are as wide as a common terminal
    return int(terminal._tw.fullwidth) if hasattr(terminal, "_tw") else 80
