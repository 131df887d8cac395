"""A user's own transcripts: rows in `*.jsonl` of a golden folder, answers recorded under `transcripts/<target>/`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.findings import Finding, Result
from pytest_mistral_lora.conformance.golden_rows import OwnCase, own_cases, recorded, refused
from pytest_mistral_lora.conformance.targets import AdapterTarget
from pytest_mistral_lora.conformance.transcript.answering import Answering
from pytest_mistral_lora.conformance.transcript.checks import Judged
from pytest_mistral_lora.errors import InputError, PinError, TokenizerError

if TYPE_CHECKING:
    from pytest_mistral_lora.records.transcripts import Transcript
    from pytest_mistral_lora.training.answers.recording import Question


def checks(target: AdapterTarget, settings: Settings, answering: Answering) -> Iterator[Check]:
    """Yield one check for each row and each recorded transcript of the user's folders."""
    for case in own_cases(settings.golden_folders, "transcripts", target):
        yield Check(target, "transcript", case.check, partial(_record if settings.update else _judge, answering, case))


def _judge(answering: Answering, case: OwnCase) -> Result:
    if case.unusable:
        return refused(case.unusable)
    if not case.path.is_file():
        return Result(not_checked="no answer to the row is recorded: record it with --mistral-golden-update")
    judged = Judged(answering, case.path)
    if not judged.transcripts:
        return judged.files()
    moved = _moved(case, judged.transcripts[0])
    if moved.findings:
        return moved
    results = [judged.on_base(), judged.prompts(), judged.answers(), judged.formats()]
    findings = tuple(finding for one in results for finding in one.findings)
    reasons = [one.not_checked for one in results if one.not_checked]
    facts = tuple(fact for one in results for fact in one.facts)
    return Result(findings, "" if findings or not reasons else reasons[0], facts)


def _moved(case: OwnCase, transcript: Transcript) -> Result:
    """Return the finding of a row that asks something else than its transcript answers."""
    from pytest_mistral_lora.training.answers.recording import Question

    try:
        asked = _question(case, transcript)
    except InputError as error:
        return refused(error)
    if case.row is None or asked == Question.again(transcript):
        return Result()
    row = case.row.row
    said = "the row is not the one that was recorded"
    return Result((Finding("ML007", said, row.place, f"the row of {case.path}", row=row.to_jsonl()),))


def _question(case: OwnCase, before: Transcript | None) -> Question | None:
    """Return what a case asks; None where there is neither a row nor a transcript."""
    from pytest_mistral_lora.training.answers.recording import Question

    if case.row is not None:
        return Question.of_line(case.path.stem, case.row.row, case.row.line, before)
    return None if before is None else Question.again(before)


def _record(answering: Answering, case: OwnCase) -> Result:
    from pytest_mistral_lora.records.transcripts import load

    if case.unusable:
        return refused(case.unusable)
    try:
        before = load(case.path) if case.path.exists() else None
    except InputError as error:
        anew = "a golden transcript, or no file: remove it to record anew"
        return Result((Finding("ML801", error.found, error.place, anew),))
    if answering.missing:
        return Result((Finding("ML007", f"cannot be recorded: {answering.missing}", str(answering.folder)),))
    try:
        return _written(answering, case, before)
    except (PinError, TokenizerError):
        raise
    except InputError as error:
        return refused(error)


def _written(answering: Answering, case: OwnCase, before: Transcript | None) -> Result:
    from pytest_mistral_lora.training.answers.recording import ask, check_same_kind

    adapted, question = answering.adapted, _question(case, before)
    if question is None:
        return Result(not_checked=f"{case.path} has gone since it was collected")
    if before is not None:
        check_same_kind(before, adapted, case.path)
    adapted.encoder.prompt(question.row)  # a row that cannot be asked is said before a model is loaded
    return recorded(case, ask(answering.model, adapted, question).put(case.path, before))
