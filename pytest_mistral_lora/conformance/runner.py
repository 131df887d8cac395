"""Subject `runner`: the rows of another trainer, encoded once for all checks and all workers of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from filelock import FileLock

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.encoded.audit import CASES, KEPT, NOTHING_JUDGED, Audit, rules_of
from pytest_mistral_lora.conformance.encoded.line_judge import LineVerdict
from pytest_mistral_lora.conformance.encoded.template_cause import cause_of
from pytest_mistral_lora.conformance.finding import Finding, Result, first_findings, in_words
from pytest_mistral_lora.conformance.targets import RunnerTarget
from pytest_mistral_lora.errors import InputError, RunnerError
from pytest_mistral_lora.formats.row_sources import FileRows, MadeRows
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.goldens import packaged_cases

_NO_ROWS = "the runner gave no rows"
_ALL_ROWS = "all-rows"
"""The case for findings about all packaged rows together."""


@dataclass(frozen=True)
class RunnerRows:
    """The rows that a runner encoded, with the verdicts on them.

    Attributes:
        rows: The rows that the runner got.
        cases: The names of the packaged rows; empty for other rows.
        verdicts: The verdict on each row.
        file_findings: The findings about all rows together.
        ran_under: Versions and configuration of the run.
        refused: The number of rows that the runner did not encode.
        version: The tokenizer's version.
        not_checked: Why a check had nothing to judge, by its name; see `Audit.not_checked`.
        explained: Why a wrong row has no finding; see `Audit.explained`.
    """

    rows: Sequence[Row]
    cases: Sequence[str]
    verdicts: Sequence[LineVerdict]
    file_findings: tuple[Finding, ...]
    ran_under: object
    refused: object
    version: str
    not_checked: Mapping[str, str]
    explained: str

    @property
    def nothing_judged(self) -> str:
        """Why no row has a verdict; empty if any row has."""
        return NOTHING_JUDGED if all(verdict.state == "not judged" for verdict in self.verdicts) else ""


_Encoded = Callable[[], RunnerRows | InputError]


def encode_once(target: RunnerTarget, work_folder: Path) -> RunnerRows | InputError:
    """Let the runner encode a target's rows, or read a worker's result in this session; judge them.

    A failure is returned and kept like a success, because a runner that cannot start may take minutes to fail. So is a
    row that cannot be given to it.
    """
    from pytest_mistral_lora.runners import find_runner
    from pytest_mistral_lora.runners.extract import extract, extract_prompts
    from pytest_mistral_lora.runners.given_rows import GivenRows
    from pytest_mistral_lora.runners.prompts import prompt_rows

    version, runner = target.oracle.version, find_runner(target.runner)
    try:
        own = GivenRows.read(runner, target.row_files(), config=target.path)
    except InputError as error:
        return error
    given = own if own.rows else GivenRows.packaged(runner, target.oracle)
    file = work_folder / f"{target.name}.jsonl"
    note = file.with_suffix(".json")
    with FileLock(file.with_suffix(".lock")):
        if not note.exists():
            encode = partial(extract, runner, given.rows, task=given.task)
            if runner.is_evaluation:
                encode = partial(extract_prompts, runner)
            try:
                options: dict[str, Any] = {"oracle": target.tokenizer.declared, "allow_code": target.allow_code}
                made = encode(target.tokenizer.path, file, config=target.path, **options)
            except RunnerError as error:
                write_json(note, {"error": str(error)})
            else:
                write_json(note, {"ran_under": made.ran_under, "refused": made.refused})
        outcome = read_json(note)
    if "error" in outcome:
        return RunnerError(str(outcome["error"]))
    rows = prompt_rows(file) if runner.is_evaluation else given.by_line
    trained = own.rows if runner.is_evaluation else ()
    fixes = runner.known_fixes(given.task)
    audit = Audit(
        MadeRows(FileRows(file), [row.place for row in rows], Place.of(target.name)),
        target.oracle,
        base=target.tokenizer.files,
        judges_texts=bool(own.rows),
        trained=trained,
        cause=cause_of(target.judge),
        # a key of chat rows says nothing of preferences
        declared=target.objective if given.task else target.declaration,
    )
    verdicts = [replace(verdict, findings=in_words(verdict.findings, fixes)) for verdict in audit.verdicts()]
    whole = verdicts.pop()
    cases = [] if target.has_own_rows else [case.name for case in packaged_cases() if case.fits(target.oracle)]
    outcomes = (outcome["ran_under"], outcome["refused"])
    return RunnerRows(rows, cases, verdicts, whole.findings, *outcomes, version, audit.not_checked, audit.explained)


def checks(target: RunnerTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a runner: one of the run itself, then one for each packaged row, or each group of classes.

    The first check that runs lets the runner encode the rows for all checks.
    """
    encoded = cache(partial(encode_once, target, settings.work_folder))
    yield Check(target, "runner", "extraction", partial(_check_run, encoded))
    if not target.has_own_rows:
        for case in (*(packaged.name for packaged in packaged_cases()), _ALL_ROWS):
            yield Check(target, "runner", case, partial(_check_packaged, encoded, case))
    else:
        for group in CASES:
            yield Check(target, "runner", group, partial(_check_classes, encoded, target.name, group))


def _check_run(encoded: _Encoded) -> Result:
    made = encoded()
    if isinstance(made, InputError):
        raise made  # this check reports the reason, and the others are `not checked`
    return Result(facts=(("ran under", made.ran_under), ("rows", len(made.rows)), ("refused", made.refused)))


def _check_packaged(encoded: _Encoded, case: str) -> Result:
    made = encoded()
    if isinstance(made, InputError):
        return Result(not_checked=_NO_ROWS)
    if case == _ALL_ROWS:
        return Result(made.file_findings, "" if made.file_findings else made.nothing_judged)
    if case not in made.cases:
        return Result(not_checked=f"{made.version} does not encode it")
    index = made.cases.index(case)
    verdict = made.verdicts[index]
    if verdict.state != "sound" and not verdict.findings:
        return Result(not_checked=made.explained or "no verdict")
    return Result(verdict.findings)


def _check_classes(encoded: _Encoded, name: str, group: str) -> Result:
    made = encoded()
    if isinstance(made, InputError):
        return Result(not_checked=_NO_ROWS)
    rules = rules_of(group)
    by_rule: dict[str, list[Finding]] = {}
    for findings in [*(verdict.findings for verdict in made.verdicts), made.file_findings]:
        for finding in findings:
            if finding.rule in rules:
                by_rule.setdefault(finding.rule, []).append(finding)
    shown = (first_findings(of_rule, KEPT, Place.of(name)) for of_rule in by_rule.values())
    if not by_rule and group in made.not_checked:
        return Result(not_checked=made.not_checked[group])
    return Result(tuple(finding for of_rule in shown for finding in of_rule))
