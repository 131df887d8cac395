"""Subject `runner`: a runner's ids and labels against mistral-common's, on the packaged rows or on a recipe's data."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.encoded.checks import CASES, KEPT
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.runner.extracted import Extracted, extracted
from pytest_mistral_lora.conformance.targets import RunnerTarget
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.records.goldens import packaged_cases

_NO_ROWS = "the runner gave no rows"


def checks(target: RunnerTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of a runner: that its rows can be had, and then a check a packaged row, or a group of classes.

    The first that runs lets the runner encode the rows for all of them.
    """
    yield Check(target, "runner", "extraction", partial(_extraction, target, settings))
    if target.reads_packaged_rows:
        for case in packaged_cases():
            yield Check(target, "runner", case.name, partial(_packaged_row, target, settings, case.name))
        yield Check(target, "runner", "all-rows", partial(_all_rows, target, settings))
    else:
        for group, rules in CASES.items():
            yield Check(target, "runner", group, partial(_group, target, settings, rules))


def _extraction(target: RunnerTarget, settings: Settings) -> Result:
    made = extracted(target, settings)
    return Result(facts=(("ran under", made.ran_under), ("rows", len(made.rows)), ("refused", made.refused)))


def _made(target: RunnerTarget, settings: Settings) -> Extracted | None:
    """Return the runner's rows, or None where they cannot be had: one check says why, the others are not checked."""
    try:
        return extracted(target, settings)
    except RunnerError:
        return None


def _packaged_row(target: RunnerTarget, settings: Settings, case: str) -> Result:
    made = _made(target, settings)
    if made is None:
        return Result(not_checked=_NO_ROWS)
    if case not in made.cases:
        return Result(not_checked=f"{made.version} does not encode it")
    index = made.cases.index(case)
    verdict = made.verdicts[index]
    if verdict.state == "not judged" and not verdict.findings:
        return Result(not_checked="no verdict")
    return Result(_placed(verdict.findings, made.rows[index].place))


def _all_rows(target: RunnerTarget, settings: Settings) -> Result:
    made = _made(target, settings)
    return Result(not_checked=_NO_ROWS) if made is None else Result(_placed(made.of_the_file, target.name))


def _group(target: RunnerTarget, settings: Settings, rules: Collection[str]) -> Result:
    made = _made(target, settings)
    if made is None:
        return Result(not_checked=_NO_ROWS)
    findings = [
        finding
        for row, verdict in zip(made.rows, made.verdicts, strict=True)
        for finding in _placed(verdict.findings, row.place)
        if finding.rule in rules
    ]
    findings += [finding for finding in _placed(made.of_the_file, target.name) if finding.rule in rules]
    return Result(tuple(_first_of_each(findings, target.name)))


def _first_of_each(findings: list[Finding], place: str) -> Iterator[Finding]:
    for rule in dict.fromkeys(finding.rule for finding in findings):
        of_rule = [finding for finding in findings if finding.rule == rule]
        yield from of_rule[:KEPT]
        if len(of_rule) > KEPT:
            yield Finding(rule, f"… and {len(of_rule) - KEPT} more", place)


def _placed(findings: Collection[Finding], place: str) -> tuple[Finding, ...]:
    """Return findings at the row's own place: the encoded rows are removed with the session."""
    return tuple(replace(finding, place=place) for finding in findings)
