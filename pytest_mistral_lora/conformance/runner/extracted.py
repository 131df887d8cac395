"""A runner's rows, made once for all checks and all workers of a session, and judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from pytest_mistral_lora.chat.rows import Row, read_rows
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.encoded.audit import Audit, Verdict
from pytest_mistral_lora.conformance.findings import Finding
from pytest_mistral_lora.conformance.targets import RunnerTarget
from pytest_mistral_lora.errors import RunnerError
from pytest_mistral_lora.records.files import read_json, write_json
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
    verdicts: Sequence[Verdict]
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
