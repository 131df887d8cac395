"""A runner's rows, made once for all checks and all workers of a session, and judged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from filelock import FileLock

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.chat.rows import Row, read_rows
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.encoded.audit import CASES, KEPT, Audit, LineVerdict
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import RunnerTarget
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.goldens import packaged_cases


@dataclass(frozen=True)
class Extracted:
    """What a runner made, and what is wrong with it.

    Attributes:
        rows: The rows that it was given.
        cases: Their names, where they are the packaged rows.
        verdicts: The verdict on each row.
        of_the_file: What is wrong with all of them together.
        ran_under: Versions and configuration.
        refused: How many rows the runner made nothing of.
        version: The tokenizer's version.
    """

    rows: Sequence[Row]
    cases: Sequence[str]
    verdicts: Sequence[LineVerdict]
    of_the_file: tuple[Finding, ...]
    ran_under: object
    refused: object
    version: str


def extracted(target: RunnerTarget, settings: Settings) -> Extracted:
    """Return what a runner makes of a target's rows.

    Raises:
        RunnerError: If its rows cannot be had.
    """
    if "extracted" not in target._loaded:
        try:
            target._loaded["extracted"] = _extracted(target, settings)
        except RunnerError as error:
            target._loaded["extracted"] = error
    found: Extracted | RunnerError = target._loaded["extracted"]
    if isinstance(found, RunnerError):
        raise found
    return found


def _extracted(target: RunnerTarget, settings: Settings) -> Extracted:
    version = target.oracle.version
    named = [(case.name, case.row) for case in packaged_cases() if version in case.versions]
    own = [row for path in target.dataset for row in read_rows(path)]
    rows = own or [row for _, row in named]
    file = settings.work_folder / f"{target.name}.jsonl"
    with FileLock(file.with_suffix(".lock")):
        told = _run_once(target, rows, file)
    *verdicts, whole = Audit(file, target.oracle).verdicts()
    names = [] if own else [name for name, _ in named]
    return Extracted(rows, names, verdicts, whole.findings, told["ran_under"], told["refused"], version)


def _run_once(target: RunnerTarget, rows: Sequence[Row], file: Path) -> dict[str, object]:
    """Run the runner where no worker of the session has; what one could not get, the others do not try again."""
    note = file.with_suffix(".json")
    if not note.exists():
        write_json(note, _run(target, rows, file))
    told: dict[str, object] = read_json(note)
    if "error" in told:
        raise RunnerError(str(told["error"]))
    return told


def _run(target: RunnerTarget, rows: Sequence[Row], file: Path) -> dict[str, object]:
    from pytest_mistral_lora.runners.extract import extract
    from pytest_mistral_lora.runners.runner import find_runner

    try:
        made = extract(find_runner(target.runner), rows, target.tokenizer.path, file, config=target.path)
    except RunnerError as error:
        return {"error": str(error)}
    return {"ran_under": made.ran_under, "refused": made.refused}


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
