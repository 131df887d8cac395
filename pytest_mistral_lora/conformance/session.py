"""One run of the suite, for every front: its checks, their outcomes, the known deviations, and the verdict."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.conformance.check_options import DEFAULT, CheckOptions
from pytest_mistral_lora.conformance.checks import ROOT, Check, Settings
from pytest_mistral_lora.conformance.collection import collect
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.groups import MOST_WHOLE, FindingGroups, failed_rows, group_findings, signs_among
from pytest_mistral_lora.conformance.known import (
    NAMED_BY_RECORDS,
    Xfail,
    finders_of,
    known_among,
    known_deviations,
    standings_of,
    unknown_among,
)
from pytest_mistral_lora.conformance.outcome import CheckOutcome, State
from pytest_mistral_lora.conformance.written_xfails import xfails_text
from pytest_mistral_lora.errors import EXIT_FINDING, EXIT_OK, InputError, counted, one_line
from pytest_mistral_lora.escaping import printable

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.token_rows import TokenRow
    from pytest_mistral_lora.conformance.kept_results import KeptResults
    from pytest_mistral_lora.conformance.targets import Target
    from pytest_mistral_lora.programs.facts import Standing


class Session:
    """A run of the suite.

    A front that runs checks by another runner, perhaps in other processes, takes the checks from `collect`, asks
    `outcome_of` for each result and gives the outcome to `take`. Other fronts call `run`.

    Attributes:
        settings: The settings of the checks.
        options: What the user decides.
        leaves_out_targets: Whether the configuration of the run names more targets than the run judges.
        kept: The results of earlier runs, or None.
        keeps_going: Whether a check that stops with an error is not checked, and the run goes on.
        collected: The node id of each check, deselected ones included.
        deselected: The number of deselected checks.
        outcomes: The outcome of each check that ran.
    """

    def __init__(
        self,
        targets: Callable[[], Sequence[Target]],
        settings: Settings,
        options: CheckOptions = DEFAULT,
        *,
        leaves_out_targets: bool = False,
        kept: KeptResults | None = None,
        keeps_going: bool = False,
    ) -> None:
        """Begin a run.

        Args:
            targets: Makes the targets. It is called on first use, and raises an error of this project if a target
                cannot be used.
            settings: The settings of the checks.
            options: What the user decides.
            leaves_out_targets: Whether the configuration of the run names more targets than the run judges.
            kept: The results of earlier runs, for a run by `run`; None to run every check.
            keeps_going: Whether a check that stops with an error is not checked, and the run goes on.
        """
        self.settings = settings
        self.options = options
        self.leaves_out_targets = leaves_out_targets
        self.kept = kept
        self.keeps_going = keeps_going
        self.collected: list[str] = []
        self.deselected = 0
        self.outcomes: list[CheckOutcome] = []
        self._make_targets = targets
        self._causes: FindingGroups | None = None
        self._lists: dict[Path | None, tuple[Xfail, ...]] = {}
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

    def run(
        self,
        commands: Callable[[str], Mapping[str, str]] = lambda target: {},
    ) -> Iterator[CheckOutcome]:
        """Run every check in this process; keep and yield the outcome of each.

        Args:
            commands: Returns commands that judge a target again, by name, for the outcomes of checks with findings.
        """
        for check in self.collect():
            outcome = self._judge(check, commands(check.target.name))
            self.take(outcome)
            yield outcome

    def _judge(self, check: Check, commands: Mapping[str, str]) -> CheckOutcome:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' warnings are not about the user's code
            result = self._result_of(check)
        if self.kept is not None and not check.is_kept:
            self.kept.take(check, result)
        outcome = self.outcome_of(check, result)
        return replace(outcome, seconds=time.perf_counter() - start, commands=commands)

    def _result_of(self, check: Check) -> Result:
        try:
            return check.run()
        except Exception as error:
            if not self.keeps_going:
                raise
            return Result(not_checked=f"the check ended with {type(error).__name__}: {one_line(error)}")

    def outcome_of(self, check: Check, result: Result) -> CheckOutcome:
        """Return the outcome of a check, divided by the known deviations.

        Args:
            check: The check.
            result: Its result.
        """
        nodeid = f"{ROOT}::{check.name}"

        def server() -> str:
            return check.target.served_by

        rules, xfails = self.options.rules, (*self.options.xfails, *self._listed_by(check.target))
        found = result.findings if rules is None else tuple(rules.applied(result.findings))
        outcome = CheckOutcome(
            check.target.name,
            check.subject,
            check.case,
            "passed",
            findings=tuple(unknown_among(found, nodeid, xfails, server)),
            known=tuple(known_among(found, nodeid, xfails, server)),
            not_checked=result.not_checked,
            facts=dict(result.facts),
        )
        state: State = "skipped" if result.not_checked else "passed"
        if outcome.failing(notes=self.options.fails_notes) or self.fails_unchecked(outcome):
            state = "failed"
        elif any(finding.severity == "error" for finding in found):
            state = "known"
        return replace(outcome, state=state)

    def fails_unchecked(self, outcome: CheckOutcome) -> bool:
        """Return whether a check fails because it could not judge."""
        if not (outcome.not_checked and self.options.fails_not_checked):
            return False
        # such a check breaks no rule, so only its node id can accept it
        return not any(xfail.id == outcome.nodeid and not xfail.is_over for xfail in self._xfails)

    def take(self, outcome: CheckOutcome) -> None:
        """Keep the outcome of a check of this or another process."""
        self.outcomes.append(outcome)
        self._causes = None

    def go_on_from(self, earlier: Sequence[CheckOutcome]) -> None:
        """Put outcomes of an earlier session in front, but for those of checks that this session has run again."""
        kept = [outcome for outcome in earlier if outcome.nodeid not in self.collected]
        self.outcomes[:0] = kept
        self.collected[:0] = [outcome.nodeid for outcome in kept]
        self._causes = None

    @property
    def not_run(self) -> int:
        """The number of chosen checks without an outcome, for example because the run stopped."""
        return len(self.collected) - self.deselected - len(self.outcomes)

    @property
    def nothing_judged(self) -> bool:
        """Whether checks ran, but none could judge: such a run must not count as a pass."""
        return bool(self.outcomes) and all(outcome.state == "skipped" for outcome in self.outcomes)

    @property
    def unmatched(self) -> list[Xfail]:
        """The known deviations that are out of date: every check that can find them ran, and none found them."""
        return [xfail for xfail in self._without_finding() if self._is_looked_for(xfail)]

    @property
    def not_met(self) -> list[Xfail]:
        """The known deviations without a finding that may still exist: a check that can find them did not run."""
        return [xfail for xfail in self._without_finding() if not self._is_looked_for(xfail)]

    @property
    def remarks_on_known(self) -> list[str]:
        """Lines on known deviations: those that are not met, and those of a known fault that the versions do not have.

        A fault that has ended, or that nobody has checked with the versions of the run, still accepts its findings.
        """
        lines, remarked = [], set()
        for xfail in self._xfails:
            for standing in self._standings(xfail):
                if standing.remark and xfail.id not in remarked:
                    remarked.add(xfail.id)
                    ended = "; it is still accepted: remove it" if standing.state == "ended" else ""
                    lines.append(f"{xfail.id} ({xfail.place}): {standing.remark}{ended}")
        for xfail in self.not_met:
            standings = self._standings(xfail)
            if standings and all(standing.state == "absent" for standing in standings):
                lines.append(f"not met: {xfail.id} ({xfail.place}): the versions of this run do not have the fault")
            elif xfail.id not in remarked:
                lines.append(xfail.not_met)
        return lines

    @property
    def remarks_on_rules(self) -> list[str]:
        """A line on the findings that count by newer rules alone; empty if there is none."""
        newer = sum(bool(cause.simplest.from_version) for cause in self.causes())
        rules = self.options.rules
        if rules is None or not newer:
            return []
        return [f"rules of {rules.version}: {counted(newer, 'note')} of later rules or bounds"]

    def _standings(self, xfail: Xfail) -> list[Standing]:
        """Return what the fact behind a known deviation says about the run; empty for one that names no known fault."""
        return standings_of(xfail, self._servers.values()) if xfail.is_of_fault else []

    @property
    def _servers(self) -> dict[str, str]:
        """The server of each target that is one, with its version."""
        return {outcome.target: proof for outcome in self.outcomes if (proof := outcome.facts.get("server of"))}

    def _without_finding(self) -> list[Xfail]:
        return [xfail for xfail in self._xfails if not any(outcome.meets(xfail) for outcome in self.outcomes)]

    @property
    def _xfails(self) -> list[Xfail]:
        """The known deviations of the run and of its targets."""
        listed = chain(self.options.xfails, *map(self._listed_by, self.targets))
        # a recipe may name the list of the run
        return [*{(xfail.id, xfail.place): xfail for xfail in listed}.values()]

    def _listed_by(self, target: Target) -> tuple[Xfail, ...]:
        """Return the known deviations that a target lists; none if its list cannot be read, which a check reports."""
        file = target.xfails_file
        if file is not None and file not in self._lists:
            self._lists[file] = ()
            with suppress(InputError):
                self._lists[file] = known_deviations(file, "xfails")
        return self._lists.get(file, ())

    def _is_looked_for(self, xfail: Xfail) -> bool:
        """Return whether every check that can find a deviation ran, and a check of its own subjects could judge."""
        outcomes: dict[str, str] = {outcome.nodeid: outcome.state for outcome in self.outcomes}
        if xfail.is_of_one_check:
            if xfail.id in self.collected:
                return outcomes.get(xfail.id, "skipped") != "skipped"
            if xfail.id.split("::", 3)[2] in NAMED_BY_RECORDS:
                return False
            # the other checks of this target and subject are in the run: the name of the check is wrong
            of_subject = xfail.id.split("::", 3)[:3]
            return any(nodeid.split("::", 3)[:3] == of_subject for nodeid in self.collected)
        standings = self._standings(xfail)
        if standings and not any(standing.state == "present" for standing in standings):
            return False
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
        failed = any(outcome.state == "failed" for outcome in self.outcomes)
        return EXIT_FINDING if failed or self.unmatched or self.nothing_judged else EXIT_OK

    def causes(self) -> FindingGroups:
        """Return the findings by cause; they are grouped once for all outputs."""
        if self._causes is None:
            self._causes = group_findings(self.outcomes)
        return self._causes

    def verdict(self) -> str:
        """Return the last line for people: the numbers of findings and of judged checks."""
        from pytest_mistral_lora.report import verdict_line

        return verdict_line(self.outcomes, [cause.total for cause in self.causes()])

    def known_faults(self) -> list[str]:
        """Return a line for each known fault of the installed libraries that can cause a finding."""
        if not any(outcome.findings for outcome in self.outcomes):
            return []  # a run from the cache reads no facts, whose schema takes half a second
        from pytest_mistral_lora.environment import known_cause_lines
        from pytest_mistral_lora.programs.facts import Symptom

        servers = self._servers
        symptoms = (
            Symptom(
                finding.rule,
                finding.found,
                outcome.subject,
                outcome.case,
                servers.get(outcome.target, ""),
                finding.name,
            )
            for outcome in self.outcomes
            for finding in outcome.findings
        )
        return known_cause_lines(symptoms)

    def cause_texts(self, width: int, whole_by: str = "") -> list[str]:
        """Return a text for each cause of findings: its check, its simplest finding, and the places of the others.

        Signs have their lines at the end of the summary.

        Args:
            width: Columns of the terminal.
            whole_by: The option that shows each cause whole: those behind the first `MOST_WHOLE` are one line each.
                Empty to show them whole.
        """
        states = {"error": "FAILED", "note": "note"}
        causes = [cause for cause in self.causes() if not cause.simplest.is_sign]
        whole = causes[:MOST_WHOLE] if whole_by else causes
        texts = [f"{cause.check} {states[cause.simplest.severity]}\n{cause.text(width)}\n" for cause in whole]
        if rest := causes[len(whole) :]:
            lines = [f"{counted(len(rest), 'more cause')}, a line each ({whole_by} shows them whole):"]
            texts.append("\n".join([*lines, *(cause.headline(width) for cause in rest), ""]))
        return texts

    @property
    def opening_lines(self) -> list[str]:
        """The first lines of the verdict for people: the objective that is declared; none without one."""
        from pytest_mistral_lora.report import objective_lines

        return [printable(line, lines=False) for line in objective_lines(self.outcomes)]

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
        )
        from pytest_mistral_lora.report.tables import figure_lines, outcome_table, statistics_of

        is_brief = brief and self.exit_code == 0
        table: list[str] = []
        facts: list[str] = []
        if not is_brief:
            table = outcome_table(self.outcomes, width)
            figures = [
                line
                for target, found in statistics_of(self.outcomes).items()
                for line in (f"figures of {target}:", *figure_lines(found, width))
            ]
            facts += [*basis_lines(self.outcomes), *self.known_faults(), *figures, *unchecked_lines(self.outcomes)]
        facts += self.remarks_on_known
        facts += self.remarks_on_rules
        if self.kept is not None and self.kept.found:
            facts.append(
                f"{counted(self.kept.found, 'check')} from the cache: nothing that they read has changed since they "
                "passed (--no-cache judges them again)"
            )
        if self.kept is not None and self.kept.distrust:
            facts.append(f"results of earlier runs are not used, and none are kept: {self.kept.distrust}")
        signs = look_at_lines(signs_among(self.causes()))
        if is_brief:
            facts = [*brief_lines(self.outcomes, self.known_faults(), [*facts, *notes], signs)]
        return [
            *table,
            # one line each, for any name or reason
            *(line if line in notes else printable(line, lines=False) for line in facts),
            *([] if is_brief else [*notes, "", *signs]),
            *([NOTHING_WAS_JUDGED] if self.nothing_judged else []),
            self.verdict(),
        ]

    def failed_rows(self) -> list[TokenRow]:
        """Return the row of each cause with a row, as mistral-common encodes it."""
        causes = list(self.causes())
        return failed_rows(causes, self.targets) if causes else []

    def write_xfails(self) -> None:
        """Write the list of known deviations that accepts this run, if the user names a file; you add the reasons.

        Raises:
            InputError: If the file cannot be written.
        """
        from pytest_mistral_lora.records.files import write_text

        if self.options.write_xfails is not None:
            write_text(self.options.write_xfails, xfails_text(self.outcomes, self.options))

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
        code = self.exit_code if exit_code is None else exit_code
        return report_data(
            [outcome.to_json() for outcome in self.outcomes],
            code,
            RunFacts(command, self._started, seconds, code_of(folder), folder.resolve().name),
            verdict=self.verdict(),
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
    options: CheckOptions = DEFAULT,
    *,
    kept: Path | None = None,
    keeps_going: bool = False,
) -> Iterator[Session]:
    """Yield a session in this process only; if it makes a folder, the folder is removed at the end.

    Args:
        targets: The targets.
        options: What the user decides.
        kept: The folder of the results of earlier runs; None to run every check.
        keeps_going: As for `Session`.
    """
    settings = options.settings()
    with closing(settings):
        results = None
        if kept is not None:
            from pytest_mistral_lora.conformance.kept_results import KeptResults

            results = KeptResults(kept)
        yield Session(lambda: targets, settings, options, kept=results, keeps_going=keeps_going)
