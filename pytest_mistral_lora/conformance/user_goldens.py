"""Golden folders of a user: rows with their recorded renderings and answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.chat.kinds.records import parse_trained
from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.conformance.targets import EncodedTarget, RecipeTarget, Target, free_name
from pytest_mistral_lora.conformance.template import judge
from pytest_mistral_lora.conformance.transcript import TranscriptChecks, TranscriptModel, load_model, model_of
from pytest_mistral_lora.errors import InputError, MistralLoraError, OracleRejection, PinError, RowError, TokenizerError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.goldens import Case, Golden, check_case_name, golden_paths, load, record

if TYPE_CHECKING:
    from pytest_mistral_lora.records.files import Written
    from pytest_mistral_lora.records.transcripts import Transcript
    from pytest_mistral_lora.training.generate.model_spec import Question

Kind = Literal["templates", "transcripts"]
"""The folders of a golden folder: renderings by tokenizers, answers of adapters; each has a folder a target."""


@dataclass(frozen=True, slots=True)
class GoldenRow:
    """A row of a golden folder.

    Attributes:
        row: The row.
        line: Its whole line, with the keys beside the row: `name`, `checks`, `max_new_tokens`.
    """

    row: Row
    line: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class UserCase:
    """A row of a golden folder and its file, for one target.

    Attributes:
        check: Name of the check, `own-<name>`.
        path: The file of the recording, which may not exist yet.
        row: The row; None if only the file remains, or the row cannot be used.
        unusable: The reason why the row cannot be used, or None.
        orphan: Whether the folder has rows, but this file has none.
    """

    check: str
    path: Path
    row: GoldenRow | None
    unusable: RowError | None
    orphan: bool


def user_cases(folders: Iterable[Path], kind: Kind, target: Target) -> Iterator[UserCase]:
    """Yield a case for each row and each recorded file of the user's golden folders."""
    taken: set[str] = set()
    for folder in folders:
        rows, home = _read_golden_rows(folder), folder / kind / target.name
        for name in sorted({*rows, *(path.stem for path in golden_paths(home))}):
            check = free_name(f"own-{name}", taken)
            taken.add(check)
            row = rows.get(name)
            usable, error = (None, row) if isinstance(row, RowError) else (row, None)
            yield UserCase(check, home / f"{name}.json", usable, error, orphan=bool(rows) and row is None)


def unused_folders(folders: Iterable[Path], targets: Sequence[Target]) -> Iterator[Path]:
    """Yield each folder of the golden folders that belongs to no target of the run."""
    adapters = {target.name for target in targets if isinstance(target, AdapterTarget | RecipeTarget)}
    tokenizers = {target.name for target in targets if not isinstance(target, AdapterTarget | EncodedTarget)}
    for folder in folders:
        for kind, names in (("templates", tokenizers), ("transcripts", adapters)):
            homes = sorted((folder / kind).glob("*/"))
            yield from (home for home in homes if home.name not in names and golden_paths(home))


def error_result(error: MistralLoraError, rule: str = "ML007") -> Result:
    """Return an error as the finding of a rule."""
    return Result((Finding(rule, error.found, error.place, error.expected, error.next_step),))


def recording_result(case: UserCase, written: Written) -> Result:
    """Return the result of a check that recorded its case: the file, and whether it is new, changed or equal."""
    return Result(facts=(("golden", str(case.path)), ("written", written), ("orphan", case.orphan)))


def _read_golden_rows(folder: Path) -> dict[str, GoldenRow | RowError]:
    """Read the rows of a golden folder by name; an unusable row is the error that explains it."""
    rows: dict[str, GoldenRow | RowError] = {}
    for path in sorted(folder.glob("*.jsonl")):
        # the file's name is a part of file names and node ids
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "rows"
        try:
            items = list(scan_jsonl(path)) or [RowError("the file has no rows", place=str(path))]
        except InputError as error:
            # another format is an error of this file; the other files are read
            items = [RowError(error.found, place=error.place, expected=error.expected, next_step=error.next_step)]
        for item in items:
            row: GoldenRow | RowError
            if isinstance(item, RowError):
                number = item.place.record
                name, row = stem if number is None else f"{stem}-{number}", item
            else:
                line, data = item
                name = default = f"{stem}-{line}"
                place = Place.of(path, line)
                try:
                    row = GoldenRow(parse_trained(data, place=place), data)
                    given = data.get("name", default)
                    name = check_case_name(given if isinstance(given, str) else repr(given), place=place / "name")
                except RowError as error:
                    row = error
                except MistralLoraError as error:
                    row = RowError(error.found, place=error.place, expected=error.expected)
            if name in rows:
                first, second = (
                    golden_row.place if isinstance(golden_row, RowError) else golden_row.row.place
                    for golden_row in (rows[name], row)
                )
                row = RowError(f"the name {name!r} is taken by {first}", place=second, expected="another")
            rows[name] = row
    return rows


def rendering_checks(target: Target, settings: Settings) -> Iterator[Check]:
    """Yield one check for each row and each recorded golden of the user's folders."""
    function = _record_rendering if settings.update else _judge_rendering
    for case in user_cases(settings.golden_folders, "templates", target):
        yield Check(target, "template", case.check, partial(function, target, case))


def _judge_rendering(target: Target, case: UserCase) -> Result:
    row, path = case.row, case.path
    if case.unusable:
        return error_result(case.unusable)
    if not path.is_file():
        # with a faulty recipe or a missing base, no row can be recorded: report this one cause
        _ = target.tokenizer
        place = row.row.place if row else NOWHERE
        return Result((Finding("ML007", "the row is not recorded", place, f"a golden {path}"),))
    try:
        golden = load(path)
    except MistralLoraError as error:
        return error_result(error, "ML001")
    if row is not None and row.row != golden.row:
        found, expected = "the row is not the one that was recorded", f"the row of {path}"
        return Result((Finding("ML007", found, row.row.place, expected, row=row.row.to_jsonl()),))
    return judge(target, golden)


def _record_rendering(target: Target, case: UserCase) -> Result:
    if case.unusable:
        return error_result(case.unusable)
    try:
        before = _before(target, case)
    except TokenizerError:
        raise  # every check reports it as ML201
    except InputError as error:
        return error_result(error, "ML001")
    source = case.row or before
    if source is None:
        return Result(not_checked=f"{case.path} has gone since it was collected")
    row = source.row
    golden_case = Case(
        name=case.path.stem,
        description=before.description if before else "A row of this golden folder.",
        row=row,
        versions=frozenset(),
    )
    try:
        golden = record(golden_case, target.tokenizer, case.path.parent)
    except TokenizerError:
        raise
    except OracleRejection as error:
        place, step = row.place or error.place, error.next_step
        return Result((Finding("ML007", error.found, place, error.expected, step, row=row.to_jsonl()),))
    except MistralLoraError as error:
        return Result((Finding("ML004", error.found, row.place, detail=error.next_step, row=row.to_jsonl()),))
    try:
        return recording_result(case, golden.put(before))
    except InputError as error:
        return error_result(error)


def _before(target: Target, case: UserCase) -> Golden | None:
    """Return the golden in a case's file, or None if there is no file.

    Raises:
        InputError: If the file is not a golden, or a golden of another tokenizer: neither is overwritten.
    """
    if not case.path.exists():
        return None
    try:
        golden = load(case.path)
    except InputError as error:
        anew = "a golden, or no file: remove it to record anew"
        raise InputError(error.found, place=error.place, expected=anew) from error
    # overwriting it would lose the golden for the tokenizer that it guards
    then, now = golden.tokenizer, target.oracle
    if then["sha256"] != now.sha256:
        found = f"recorded with another tokenizer, {then['file']} {then['sha256'][:12]}"
        expected = f"{now.path.name} {now.sha256[:12]}, or no file: remove it to record anew"
        raise InputError(found, place=str(case.path), expected=expected)
    return golden


def transcript_checks(target: AdapterTarget, settings: Settings) -> Iterator[Check]:
    """Yield one check for each row and each recorded transcript of the user's folders."""
    model = model_of(target.adapter, settings.device)
    function = _record_transcript if settings.update else _judge_transcript
    for case in user_cases(settings.golden_folders, "transcripts", target):
        yield Check(target, "transcript", case.check, partial(function, model, case))


def _judge_transcript(model: TranscriptModel, case: UserCase) -> Result:
    from pytest_mistral_lora.training.generate.model_spec import Question

    if case.unusable:
        return error_result(case.unusable)
    if not case.path.is_file():
        # not a finding: rows may be recorded only for tokenizers
        return Result(not_checked="no answer to the row is recorded: record it with --mistral-golden-update")
    judged = TranscriptChecks(model, case.path)
    if not judged.transcripts:
        return judged.files()
    try:
        question = _question(case, judged.transcripts[0])
    except InputError as error:
        return error_result(error)
    if case.row is not None and question != Question.again(judged.transcripts[0]):
        row, found = case.row.row, "the row is not the one that was recorded"
        return Result((Finding("ML007", found, row.place, f"the row of {case.path}", row=row.to_jsonl()),))
    results = [judged.recorded_on(checks_adapter=False), judged.prompts(), judged.answers(), judged.formats()]
    findings = tuple(finding for result in results for finding in result.findings)
    reasons = [result.not_checked for result in results if result.not_checked]
    facts = tuple(fact for result in results for fact in result.facts)
    return Result(findings, "" if findings or not reasons else reasons[0], facts)


def _question(case: UserCase, before: Transcript | None) -> Question | None:
    """Return the question of a case's row, or else of its transcript; None if it has neither."""
    from pytest_mistral_lora.training.generate.model_spec import Question

    if case.row is not None:
        return Question.of_line(case.path.stem, case.row.row, case.row.line, before)
    return None if before is None else Question.again(before)


def _record_transcript(model: TranscriptModel, case: UserCase) -> Result:
    from pytest_mistral_lora.records.transcripts import load
    from pytest_mistral_lora.training.generate.model_spec import ask, check_same_kind

    if case.unusable:
        return error_result(case.unusable)
    try:
        before = load(case.path) if case.path.exists() else None
    except InputError as error:
        anew = "a golden transcript, or no file: remove it to record anew"
        return Result((Finding("ML801", error.found, error.place, anew),))
    if reason := model.make_room():
        return Result((Finding("ML007", f"cannot be recorded: {reason}", Place.of(model.folder.path)),))
    try:
        spec, question = model.spec, _question(case, before)
        if question is None:
            return Result(not_checked=f"{case.path} has gone since it was collected")
        if before is not None:
            check_same_kind(before, spec, case.path)
        spec.encoder.prompt(question.row)  # report an unusable row before loading a model
        return recording_result(case, ask(load_model(model), spec, question).put(case.path, before))
    except (PinError, TokenizerError):
        raise  # every check reports these errors in the same way
    except InputError as error:
        return error_result(error)
