"""A user's own rendering goldens: rows in `*.jsonl` of a golden folder, recorded under `templates/<target>/`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.golden_rows import OwnCase, own_cases, recorded, refused
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.template.checks import judge
from pytest_mistral_lora.errors import InputError, MistralLoraError, OracleRejection, TokenizerError
from pytest_mistral_lora.records.goldens import Case, Golden, load

_DESCRIPTION = "A row of this golden folder."


def checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each row and each recorded golden of the user's folders."""
    for case in own_cases(settings.golden_folders, "templates", target):
        yield Check(target, "template", case.check, partial(_record if settings.update else _judge, target, case))


def _judge(target: Target, case: OwnCase) -> Result:
    row, path = case.row, case.path
    if case.unusable:
        return refused(case.unusable)
    if not path.is_file():
        place = row.row.place if row else ""
        return Result((Finding("ML007", "the row is not recorded", place, f"a golden {path}"),))
    try:
        golden = load(path)
    except MistralLoraError as error:
        return refused(error, "ML001")
    if row is not None and row.row != golden.row:
        found = Finding("ML007", "the row is not the one that was recorded", row.row.place, f"the row of {path}")
        return Result((replace(found, row=row.row.to_jsonl()),))
    return judge(target, golden, recorded=True)


def _record(target: Target, case: OwnCase) -> Result:
    from pytest_mistral_lora.records.recording import record

    if case.unusable:
        return refused(case.unusable)
    try:
        before = _before(target, case)
    except TokenizerError:
        raise
    except InputError as error:
        return refused(error, "ML001")
    source = case.row or before
    if source is None:
        return Result(not_checked=f"{case.path} has gone since it was collected")
    row = source.row
    asked = Case(case.path.stem, before.description if before else _DESCRIPTION, row, frozenset())
    try:
        golden = record(asked, target.tokenizer, case.path.parent)
    except TokenizerError:
        raise
    except OracleRejection as error:
        return Result((Finding("ML007", error.found, row.place or error.place, error.expected, row=row.to_jsonl()),))
    except MistralLoraError as error:
        return Result((Finding("ML004", error.found, row.place, error.next_step, row=row.to_jsonl()),))
    try:
        return recorded(case, golden.put(before))
    except InputError as error:
        return refused(error)


def _before(target: Target, case: OwnCase) -> Golden | None:
    """Return what a case's file has, or None where there is no file.

    Raises:
        InputError: If it is no golden, or one of another tokenizer: neither is written over.
    """
    if not case.path.exists():
        return None
    anew = "a golden, or no file: remove it to record anew"
    try:
        golden = load(case.path)
    except InputError as error:
        raise InputError(error.found, place=error.place, expected=anew) from error
    then, now = golden.tokenizer, target.oracle
    if then["sha256"] != now.sha256:
        raise InputError(
            f"recorded with another tokenizer, {then['file']} {then['sha256'][:12]}",
            place=str(case.path),
            expected=f"{now.path.name} {now.sha256[:12]}, or no file: remove it to record anew",
        )
    return golden
