"""One run of the suite, for every front: its checks, their records, the known deviations, and the verdict."""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.conformance.checks import ROOT, Check, Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.groups import FindingGroups, failed_rows, group_findings, signs_among
from pytest_mistral_lora.conformance.known import Xfail, baseline_text, finders_of, known_among, unknown_among
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, counted, one_line
from pytest_mistral_lora.escaping import printable

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.token_rows import TokenRow
    from pytest_mistral_lora.conformance.kept_results import KeptResults
    from pytest_mistral_lora.conformance.targets import Target

State = Literal["passed", "failed", "known", "skipped"]
"""The end of a check; `known`: each error is a known deviation; `skipped`: the check could not judge."""


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """The result of one check, divided by the known deviations of its session.

    Attributes:
        check: The check.
        result: Its result; None if it stopped with an error.
        findings: The findings that no known deviation covers.
        known: The known deviations that a finding matches.
        failing: The findings that fail the check.
        fails_unchecked: Whether it fails because it could not judge.
    """

    check: Check
    result: Result | None
    findings: tuple[Finding, ...] = ()
    known: tuple[Xfail, ...] = ()
    failing: tuple[Finding, ...] = ()
    fails_unchecked: bool = False

    @property
    def state(self) -> State:
        """How the check ended."""
        if self.result is None or self.failing or self.fails_unchecked:
            return "failed"
        if any(finding.severity == "error" for finding in self.result.findings):
            return "known"
        return "skipped" if self.result.not_checked else "passed"

    def record(self, *, seconds: float, state: str = "", commands: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the outcome as plain data, for tables and reports, and for another process.

        Args:
            seconds: The duration of the check.
            state: The outcome that the front has reported; empty for the property `state`.
            commands: Commands that repeat the check, by name; kept if there are findings.
        """
        result = self.result or Result()
        return {
            "nodeid": f"{ROOT}::{self.check.name}",
            "outcome": state or self.state,
            "seconds": round(seconds, 4),
            "target": self.check.target.name,
            "subject": self.check.subject,
            "case": self.check.case,
            "findings": [finding.to_json() for finding in self.findings],
            "known": [{"id": xfail.id, "reason": xfail.reason} for xfail in self.known],
            "not_checked": result.not_checked,
            "facts": dict(result.facts),
            "commands": commands if commands and self.findings else {},
        }


class Session:
    """A run of the suite.

    A front that runs checks by another runner, perhaps in other processes, takes the checks from `collect`, asks
    `outcome_of` for each result and gives the record to `take`. Other fronts call `run`, or `judge` for a prepared
    check.

    Attributes:
        settings: The settings of the checks.
        xfails: The known deviations.
        strict: Whether notes, and checks that could not judge, fail.
        fails_not_checked: Whether checks that could not judge fail, if `strict` is not set.
        leaves_out_targets: Whether the configuration of the run names more targets than the run judges.
        kept: The results of earlier runs, or None.
        keeps_going: Whether a check that stops with an error is not checked, and the run goes on.
        collected: The node id of each check, deselected ones included.
        deselected: The number of deselected checks.
        records: A record for each check that ran, as `CheckOutcome.record` gives it.
    """

    def __init__(
        self,
        targets: Callable[[], Sequence[Target]],
        settings: Settings,
        *,
        xfails: Sequence[Xfail] = (),
        strict: bool = False,
        fails_not_checked: bool = False,
        leaves_out_targets: bool = False,
        kept: KeptResults | None = None,
        keeps_going: bool = False,
    ) -> None:
        """Begin a run.

        Args:
            targets: Makes the targets. It is called on first use, and raises an error of this project if a target
                cannot be used.
            settings: The settings of the checks.
            xfails: The known deviations.
            strict: Whether notes, and checks that could not judge, fail.
            fails_not_checked: Whether checks that could not judge fail, if `strict` is not set.
            leaves_out_targets: Whether the configuration of the run names more targets than the run judges.
            kept: The results of earlier runs, for a run by `run`; None to run every check.
            keeps_going: Whether a check that stops with an error is not checked, and the run goes on.
        """
        self.settings = settings
        self.xfails: tuple[Xfail, ...] = tuple(xfails)
        self.strict = strict
        self.fails_not_checked = fails_not_checked or strict
        self.leaves_out_targets = leaves_out_targets
        self.kept = kept
        self.keeps_going = keeps_going
        self.collected: list[str] = []
        self.deselected = 0
        self.records: list[dict[str, Any]] = []
        self._make_targets = targets
        self._causes: FindingGroups | None = None
        self._started, self._start = datetime.now(UTC), time.perf_counter()

    @cached_property
    def targets(self) -> list[Target]:
        """The targets.

        Raises:
            MistralLoraError: If a target cannot be used.
        """
        return list(self._make_targets())

    def collect(self) -> Iterator[Check]:
        """Yield each check, in the order in which they run.

        Raises:
            MistralLoraError: If a target cannot be used.
        """
        self.collected = []
        for check in collect(self.targets, self.settings, self.kept):
            self.collected.append(f"{ROOT}::{check.name}")
            yield check

    def run(self, command: str = "") -> Iterator[dict[str, Any]]:
        """Run every check in this process, and yield the record of each.

        Args:
            command: The command that repeats the run, for the records of checks with findings; may be empty.
        """
        for check in self.collect():
            yield self.judge(check, command)

    def judge(self, check: Check, command: str = "") -> dict[str, Any]:
        """Run a check in this process, keep its record and return it.

        Args:
            check: The check, from `collect` or from the front.
            command: As for `run`.
        """
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' warnings are not about the user's code
            result = self._result_of(check)
        if self.kept is not None and not check.is_kept:
            self.kept.take(check, result, self.settings)
        outcome = self.outcome_of(check, result)
        commands = {"rerun": command} if command else {}
        record = outcome.record(seconds=time.perf_counter() - start, commands=commands)
        self.take(record)
        return record

    def _result_of(self, check: Check) -> Result:
        try:
            return check.run()
        except Exception as error:
            if not self.keeps_going:
                raise
            return Result(not_checked=f"the check ended with {type(error).__name__}: {one_line(error)}")

    def outcome_of(self, check: Check, result: Result | None) -> CheckOutcome:
        """Return the outcome of a check, without known deviations.

        Args:
            check: The check.
            result: Its result; None if it stopped with an error.
        """
        if result is None:
            return CheckOutcome(check, None)
        nodeid = f"{ROOT}::{check.name}"
        findings = unknown_among(result.findings, nodeid, self.xfails)
        # a check that could not judge breaks no rule, so only its node id can accept it
        is_accepted = any(xfail.id == nodeid and not xfail.is_over for xfail in self.xfails)
        return CheckOutcome(
            check,
            result,
            findings=tuple(findings),
            known=tuple(known_among(result.findings, nodeid, self.xfails)),
            failing=tuple(finding for finding in findings if self.strict or finding.severity == "error"),
            fails_unchecked=bool(result.not_checked) and self.fails_not_checked and not is_accepted,
        )

    def take(self, record: dict[str, Any]) -> None:
        """Keep the record of a check from this or another process."""
        self.records.append(record)
        self._causes = None

    @property
    def not_run(self) -> int:
        """The number of chosen checks without a record, for example because the run stopped."""
        return len(self.collected) - self.deselected - len(self.records)

    @property
    def nothing_judged(self) -> bool:
        """Whether checks ran, but none could judge: such a run must not count as a pass."""
        return bool(self.records) and all(record["outcome"] == "skipped" for record in self.records)

    @property
    def unmatched(self) -> list[Xfail]:
        """The known deviations that are out of date: every check that can find them ran, and none found them."""
        return [xfail for xfail in self._without_finding() if self._is_looked_for(xfail)]

    @property
    def not_met(self) -> list[Xfail]:
        """The known deviations without a finding that may still exist: a check that can find them did not run."""
        return [xfail for xfail in self._without_finding() if not self._is_looked_for(xfail)]

    def _without_finding(self) -> list[Xfail]:
        return [xfail for xfail in self.xfails if not any(xfail.is_met_by(record) for record in self.records)]

    def _is_looked_for(self, xfail: Xfail) -> bool:
        """Return whether every check that can find a deviation ran, and a check of its own subjects could judge."""
        outcomes: dict[str, str] = {record["nodeid"]: record["outcome"] for record in self.records}
        if xfail.is_of_one_check:
            if xfail.id in self.collected:
                return outcomes.get(xfail.id, "skipped") != "skipped"
            # the other checks of this target and subject are in the run: the name of the check is wrong
            of_subject = xfail.id.split("::", 3)[:3]
            return any(nodeid.split("::", 3)[:3] == of_subject for nodeid in self.collected)
        finders = finders_of(xfail)
        if self.leaves_out_targets or (self._leaves_out_training and "train" in finders.homes | finders.others):
            return False
        has_judged = False
        for nodeid in self.collected:
            _, _, subject, case = nodeid.split("::", 3)
            if finders.have(subject, case) and nodeid not in outcomes:
                return False
            if finders.are_at_home_in(subject, case) and outcomes[nodeid] != "skipped":
                has_judged = True
        return has_judged

    @property
    def _leaves_out_training(self) -> bool:
        return self.settings.skip_training and any(target.trains for target in self.targets)

    @property
    def exit_code(self) -> int:
        """1 if a check failed, a known deviation is out of date, or nothing was judged; else 0."""
        failed = any(record["outcome"] == "failed" for record in self.records)
        return EXIT_FINDING if failed or self.unmatched or self.nothing_judged else EXIT_OK

    def causes(self) -> FindingGroups:
        """Return the findings by cause; they are grouped once for all outputs."""
        if self._causes is None:
            self._causes = group_findings(self.records)
        return self._causes

    def known_faults(self) -> list[str]:
        """Return a line for each known fault of the installed libraries that can cause a finding."""
        from pytest_mistral_lora.environment import known_cause_lines

        return known_cause_lines(self.records)

    def cause_texts(self, width: int) -> list[str]:
        """Return a text for each cause of findings: its check, its simplest finding, and the places of the others.

        Signs have their lines at the end of the summary.

        Args:
            width: Columns of the terminal.
        """
        states = {"error": "FAILED", "note": "note"}
        return [
            f"{cause.check} {states[cause.simplest.severity]}\n{cause.text(width)}\n"
            for cause in self.causes()
            if not cause.simplest.is_sign
        ]

    def summary_lines(self, width: int, notes: Sequence[str] = (), *, brief: bool = False) -> list[str]:
        """Return the table of outcomes, figures, everything not checked, and the verdict, for a terminal.

        Args:
            width: Columns of the terminal.
            notes: Lines of the front, above the verdict.
            brief: Whether a run without an error has a line for each target in place of the table, the figures and the
                reasons why something was not checked.
        """
        from pytest_mistral_lora.report import (
            NOTHING_WAS_JUDGED,
            basis_lines,
            brief_lines,
            look_at_lines,
            unchecked_lines,
            verdict_line,
        )
        from pytest_mistral_lora.report.tables import figure_lines, outcome_table, statistics_of

        is_brief = brief and self.exit_code == 0
        table: list[str] = []
        facts: list[str] = []
        if not is_brief:
            table = outcome_table(self.records, width)
            figures = [
                line
                for target, found in statistics_of(self.records).items()
                for line in (f"figures of {target}:", *figure_lines(found, width))
            ]
            facts += [*basis_lines(self.records), *self.known_faults(), *figures, *unchecked_lines(self.records)]
        facts += [xfail.not_met for xfail in self.not_met]
        if self.kept is not None and self.kept.found:
            facts.append(
                f"{counted(self.kept.found, 'check')} from the cache: nothing that they read has changed since they "
                "passed (--no-cache judges them again)"
            )
        if self.kept is not None and self.kept.distrust:
            facts.append(f"results of earlier runs are not used, and none are kept: {self.kept.distrust}")
        signs = look_at_lines(signs_among(self.causes()))
        if is_brief:
            facts = [*brief_lines(self.records, self.known_faults(), [*facts, *notes], signs)]
        return [
            *table,
            # one line each, for any name or reason
            *(line if line in notes else printable(line, lines=False) for line in facts),
            *([] if is_brief else [*notes, "", *signs]),
            *([NOTHING_WAS_JUDGED] if self.nothing_judged else []),
            verdict_line(self.records, [cause.total for cause in self.causes()]),
        ]

    def failed_rows(self) -> list[TokenRow]:
        """Return the row of each cause with a row, as mistral-common encodes it."""
        causes = list(self.causes())
        return failed_rows(causes, self.targets) if causes else []

    def write_baseline(self, path: Path) -> None:
        """Write the list of known deviations that accepts this run; you add the reasons.

        Raises:
            InputError: If the file cannot be written.
        """
        from pytest_mistral_lora.records.files import write_text

        write_text(path, baseline_text(self.records, strict=self.strict, not_checked=self.fails_not_checked))

    def report(self, command: str, folder: Path, exit_code: int | None = None) -> dict[str, Any]:
        """Return the report of the run as plain JSON data.

        Args:
            command: The command line.
            folder: A folder of the repository whose commit is recorded.
            exit_code: The exit code of a command that judges more than this session; None for `exit_code`.
        """
        from pytest_mistral_lora.records.git import code_of
        from pytest_mistral_lora.report import RunFacts, report_data

        seconds = time.perf_counter() - self._start
        return report_data(
            self.records,
            self.exit_code if exit_code is None else exit_code,
            RunFacts(command, self._started, seconds, code_of(folder)),
            causes=[cause.to_json() for cause in self.causes()],
            deselected=self.deselected,
            not_run=self.not_run,
            known_faults=self.known_faults(),
        )

    def write_reports(self, paths: Sequence[Path], data: dict[str, Any]) -> None:
        """Write a report to each path, and beside it the tokens of the failed rows.

        Args:
            paths: Files whose names end in `.json` or `.html`.
            data: The result of `report`.

        Raises:
            InputError: If a file cannot be written, or is not an earlier report.
        """
        from pytest_mistral_lora.report import write_report

        rows = self.failed_rows() if paths else []
        for path in paths:
            write_report(path, data, rows)


@contextmanager
def opened_session(
    targets: Sequence[Target],
    *,
    examples: int = 20,
    device: str = "auto",
    train: bool = False,
    xfails: Sequence[Xfail] = (),
    fails_not_checked: bool = False,
    kept: Path | None = None,
    keeps_going: bool = False,
) -> Iterator[Session]:
    """Yield a session in this process only; its folder is removed at the end.

    Args:
        targets: The targets.
        examples: Hypothesis examples for each law.
        device: Device of the models: `auto`, `cpu` or `cuda`.
        train: Whether to run the tiny train with the tokenizers.
        xfails: The known deviations.
        fails_not_checked: Whether checks that could not judge fail.
        kept: The folder of the results of earlier runs; None to run every check.
        keeps_going: As for `Session`.
    """
    with tempfile.TemporaryDirectory(prefix="mistral-check-") as folder:
        settings = Settings(
            examples=examples,
            seed=None,
            device=device,
            skip_training=not train,
            golden_folders=(),
            update=False,
            work_folder=Path(folder),
        )
        results = None
        if kept is not None:
            from pytest_mistral_lora.conformance.kept_results import KeptResults

            results = KeptResults(kept)
        yield Session(
            lambda: targets,
            settings,
            xfails=xfails,
            fails_not_checked=fails_not_checked,
            kept=results,
            keeps_going=keeps_going,
        )
