"""What a user's golden folder has: rows, what was recorded of them, and recordings that nothing judges."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.chat.reading.jsonl import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.chat.templates.render import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import AdapterTarget, EncodedTarget, RecipeTarget, Target, free_name
from pytest_mistral_lora.conformance.template import judge
from pytest_mistral_lora.conformance.transcript import Answering, Judged
from pytest_mistral_lora.errors import InputError, MistralLoraError, OracleRejection, PinError, RowError, TokenizerError
from pytest_mistral_lora.records.goldens import Case, Golden, check_case_name, golden_paths, library_versions, load

if TYPE_CHECKING:
    from pytest_mistral_lora.records.files import Written
    from pytest_mistral_lora.records.transcripts import Transcript
    from pytest_mistral_lora.training.generate.questions import Question


Kind = Literal["templates", "transcripts"]
"""The folders of a golden folder: renderings by tokenizers, and answers of adapters; each has a folder a target."""


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """A row of a golden folder.

    Attributes:
        row: The conversation.
        line: Its whole line, with the keys that are not of the conversation: `name`, `checks`, `max_new_tokens`.
    """

    row: Row
    line: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class OwnCase:
    """A row of a golden folder and its file, for one target.

    Attributes:
        check: Name of the check, `own-<name>`.
        path: What was recorded, or is to be.
        row: The row; None where only the file is left, or it cannot be used.
        unusable: Why it cannot be used, or None.
        orphan: Whether the folder has rows, and this is a file without one.
    """

    check: str
    path: Path
    row: GoldenRow | None
    unusable: RowError | None
    orphan: bool


def own_cases(folders: Iterable[Path], kind: Kind, target: Target) -> Iterator[OwnCase]:
    """Yield a case for each row and each recorded file of the user's golden folders."""
    taken: set[str] = set()
    for folder in folders:
        rows, home = _unique(_rows(folder)), folder / kind / target.name
        for name in sorted({*rows, *(path.stem for path in golden_paths(home))}):
            check = free_name(f"own-{name}", taken)
            taken.add(check)
            row = rows.get(name)
            usable, wrong = (None, row) if isinstance(row, RowError) else (row, None)
            yield OwnCase(check, home / f"{name}.json", usable, wrong, orphan=bool(rows) and row is None)


def unused(folders: Iterable[Path], targets: Sequence[Target]) -> Iterator[Path]:
    """Yield each target's folder in the golden folders that belongs to none of the targets."""
    adapters = {one.name for one in targets if isinstance(one, AdapterTarget | RecipeTarget)}
    tokenizers = {one.name for one in targets if not isinstance(one, AdapterTarget | EncodedTarget)}
    for folder in folders:
        for kind, names in (("templates", tokenizers), ("transcripts", adapters)):
            homes = sorted((folder / kind).glob("*/"))
            yield from (home for home in homes if home.name not in names and golden_paths(home))


def refused(error: MistralLoraError, rule: str = "ML007") -> Result:
    """Return what an error comes to: the finding of a rule."""
    return Result((Finding(rule, error.found, error.place, error.expected),))


def recorded(case: OwnCase, written: Written) -> Result:
    """Return what recording a case comes to."""
    return Result(facts=(("golden", str(case.path)), ("written", written), ("orphan", case.orphan)))


def _unique(rows: Iterable[tuple[str, GoldenRow | RowError]]) -> dict[str, GoldenRow | RowError]:
    unique: dict[str, GoldenRow | RowError] = {}
    for name, row in rows:
        place = row.place if isinstance(row, RowError) else row.row.place
        if name in unique:
            first = unique[name]
            taken = first.place if isinstance(first, RowError) else first.row.place
            row = RowError(f"the name {name!r} is taken by {taken}", place=place, expected="another")
        unique[name] = row
    return unique


def _rows(folder: Path) -> Iterator[tuple[str, GoldenRow | RowError]]:
    for path in sorted(folder.glob("*.jsonl")):
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "rows"
        for item in scan_jsonl(path):
            if isinstance(item, RowError):
                yield f"{stem}-{item.place.rpartition(':')[2]}", item
            else:
                line, data = item
                yield _named(data, f"{path}:{line}", f"{stem}-{line}")


def _named(data: Any, place: str, default: str) -> tuple[str, GoldenRow | RowError]:
    try:
        row = GoldenRow(parse_row(data, place=place), data)
        name = data.get("name", default)
        return check_case_name(name if isinstance(name, str) else repr(name), place=f"{place}, name"), row
    except RowError as error:
        return default, error
    except MistralLoraError as error:
        return default, RowError(error.found, place=error.place, expected=error.expected)


def record(case: Case, tokenizer: CheckpointTokenizer, folder: Path) -> Golden:
    """Record a case under a tokenizer; nothing is written.

    Args:
        case: The row, with its name and description.
        tokenizer: The tokenizer file or checkpoint folder.
        folder: Where the golden will be: `folder/<case>.json`.

    Raises:
        OracleRejection: If mistral-common refuses the row.
        MistralLoraError: If the chat template does something that no named deviation explains: a golden must not
            make such a fault the expected state.
    """
    oracle = tokenizer.oracle
    comparison = compare(case.row, oracle, ChatTemplate(tokenizer.fast))
    if comparison.unexplained:
        raise MistralLoraError(
            f"the chat template differs from mistral-common: {comparison.unexplained}",
            place=f"{tokenizer.path}, case {case.name}",
            next_step="Mend the template or the row before it is recorded.",
        )
    return Golden(
        case=case.name,
        description=case.description,
        tokenizer={"file": oracle.path.name, "version": oracle.version, "sha256": oracle.sha256},
        recorded_with=library_versions(),
        row=case.row,
        encoded=comparison.oracle,
        deviations=comparison.deviations,
        path=folder / f"{case.name}.json",
    )


_DESCRIPTION = "A row of this golden folder."


def rendering_checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each row and each recorded golden of the user's folders."""
    for case in own_cases(settings.golden_folders, "templates", target):
        yield Check(
            target,
            "template",
            case.check,
            partial(_record_rendering if settings.update else _judge_rendering, target, case),
        )


def _judge_rendering(target: Target, case: OwnCase) -> Result:
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


def _record_rendering(target: Target, case: OwnCase) -> Result:

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


def transcript_checks(target: AdapterTarget, settings: Settings, answering: Answering) -> Iterator[Check]:
    """Yield one check for each row and each recorded transcript of the user's folders."""
    for case in own_cases(settings.golden_folders, "transcripts", target):
        yield Check(
            target,
            "transcript",
            case.check,
            partial(_record_transcript if settings.update else _judge_transcript, answering, case),
        )


def _judge_transcript(answering: Answering, case: OwnCase) -> Result:
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
    from pytest_mistral_lora.training.generate.questions import Question

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
    from pytest_mistral_lora.training.generate.questions import Question

    if case.row is not None:
        return Question.of_line(case.path.stem, case.row.row, case.row.line, before)
    return None if before is None else Question.again(before)


def _record_transcript(answering: Answering, case: OwnCase) -> Result:
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
    from pytest_mistral_lora.training.generate.questions import ask, check_same_kind

    adapted, question = answering.adapted, _question(case, before)
    if question is None:
        return Result(not_checked=f"{case.path} has gone since it was collected")
    if before is not None:
        check_same_kind(before, adapted, case.path)
    adapted.encoder.prompt(question.row)  # a row that cannot be asked is said before a model is loaded
    return recorded(case, ask(answering.model, adapted, question).put(case.path, before))
