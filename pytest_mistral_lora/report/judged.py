"""Verdicts for other programs: judged cases, and their places in files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.report.outcomes import Found, JudgedOutcome

CaseState = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class JudgedCase:
    """One judged thing: a check, a recorded value, a transcript.

    Attributes:
        group: The parts of its name before the last one, joined by dots.
        outcome: `passed`, `failed`, or `skipped` if it was not checked.
    """

    group: str
    outcome: CaseState


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict of one command.

    Attributes:
        command: Its name, such as `mistral-lora check`.
        causes: The findings by cause as plain data, each with the keys of a finding, `check`, `count` and `text`.
        cases: Everything that was judged.
        verdict: The last line for people.
        known: A line for each known fault of the installed libraries that can be a cause.
    """

    command: str
    causes: Sequence[Mapping[str, Any]]
    cases: Sequence[JudgedCase]
    verdict: str
    known: Sequence[str] = ()


_MOST_LINES = 10**9


@dataclass(frozen=True, slots=True)
class FilePlace:
    """A place in a file that exists.

    Attributes:
        file: The file; relative to the workflow's workspace, or else to the current folder, if it is inside.
        line: The line, from 1; 0 if the finding is about the whole file.
    """

    file: Path
    line: int = 0


def file_place(place: Place) -> FilePlace | None:
    """Return the file and the line of a finding's place; None if it is not in an existing file."""
    if place.source.is_value or not place.source.name or not os.path.lexists(place.source.name):
        return None
    # a larger number is no line: a log with such a line would be refused as a whole
    line = place.line or place.record or 0
    return FilePlace(_in_workspace(place.source.name), line if line < _MOST_LINES else 0)


def _in_workspace(file: str) -> Path:
    # not resolved: a link must keep its own name
    path = Path(os.path.normpath(Path(file).absolute()))
    workspace = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd()).absolute()
    for folder in (workspace.resolve(), workspace):
        if path.is_relative_to(folder):
            return path.relative_to(folder)
    return path


def cases_of(outcomes: Iterable[JudgedOutcome]) -> Iterator[JudgedCase]:
    """Yield the judged case of each check."""
    # a known deviation passes
    states: Mapping[str, CaseState] = {"failed": "failed", "skipped": "skipped"}
    for outcome in outcomes:
        group = outcome.nodeid.rpartition("::")[0]
        yield JudgedCase(group.replace("::", "."), states.get(outcome.state, "passed"))


def message_of(cause: Mapping[str, Any]) -> str:
    """Return a cause in a few lines, without its tokens and its row."""
    count = f" ({cause['count']} findings)" if cause["count"] > 1 else ""
    place = f"{cause['place']}: " if cause["place"] else ""
    lines = [f"{place}{cause['found']}{count}", f"check: {cause['check']}"]
    lines += [f"expected: {cause['expected']}"] if cause["expected"] else []
    return printable(redacted("\n".join([*lines, f"fix: {_fix_of(cause)}"])))


def _fix_of(cause: Mapping[str, Any]) -> str:
    """Return the fix of a cause, and a line for each program that may have made the artifact."""
    return "\n".join([cause["fix"], *(f"{name}: {fix}" for name, fix in cause.get("fixes", {}).items())])


def finding_properties(findings: Iterable[Found]) -> Iterator[tuple[str, str]]:
    """Yield name and value of the properties of a test: each rule that it breaks, with the first file and line."""
    # a check of a long file has thousands of findings; a test report needs the rule and one place
    seen = set()
    for finding in findings:
        if finding.rule in seen:
            continue
        seen.add(finding.rule)
        yield "rule", finding.rule
        yield from _file_and_line(finding)


def _file_and_line(finding: Found) -> list[tuple[str, str]]:
    place = file_place(finding.place)
    if place is None:
        return []
    file = ("file", redacted(place.file.as_posix()))
    return [file, ("line", str(place.line))] if place.line else [file]
