"""The form in which verdicts reach the writers for other machines: judged cases, findings by cause, their places."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.report.secrets import redacted

Outcome = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class JudgedCase:
    """One thing that was judged: a check, a recorded value, a transcript.

    Attributes:
        group: The parts of its name before the last one, joined by dots.
        name: The last part.
        outcome: `passed`, `failed`, or `skipped` if it was not checked.
        text: The findings for people, or the reason why it was not checked.
        findings: Its findings as plain data: `rule` and `place` are read.
        seconds: The time that it took.
    """

    group: str
    name: str
    outcome: Outcome
    text: str = ""
    findings: Sequence[Mapping[str, Any]] = ()
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Judged:
    """The verdict of one command.

    Attributes:
        command: Its name, such as `mistral-lora check`.
        causes: The findings by cause as plain data, each with the keys of a finding, `check`, `count` and `text`.
        cases: All that was judged.
        verdict: The last line for people.
        subject: The file or folder that was judged; empty if there is not one.
    """

    command: str
    causes: Sequence[Mapping[str, Any]]
    cases: Sequence[JudgedCase]
    verdict: str
    subject: str = ""


@dataclass(frozen=True, slots=True)
class FilePlace:
    """A place in a file that exists.

    Attributes:
        file: The file; relative to the workflow's workspace, or else to the current folder, if it is inside.
        line: The line, from 1; 0 if the finding is about the whole file.
    """

    file: Path
    line: int = 0

    @property
    def uri(self) -> str:
        """The file as a relative or absolute URI."""
        from urllib.parse import quote

        return self.file.as_uri() if self.file.is_absolute() else quote(self.file.as_posix())


def file_place(place: str) -> FilePlace | None:
    """Return the file and the line in a finding's place; None if it names no file that is there.

    Args:
        place: Such as `rows.jsonl:3, messages[1].role`, or the address of a server.
    """
    # a name may contain a comma: the longest part that is a file is taken
    parts = place.split(", ")
    for end in range(len(parts), 0, -1):
        name = ", ".join(parts[:end])
        path, _, line = name.rpartition(":")
        for file, number in ((name, 0), (path, int(line) if line.isdecimal() and line.isascii() else None)):
            if file and number is not None and os.path.lexists(file):
                return FilePlace(_in_workspace(Path(file)), number)
    return None


def _in_workspace(file: Path) -> Path:
    root = Path(os.environ.get("GITHUB_WORKSPACE") or Path.cwd()).resolve()
    path = Path(os.path.abspath(file))  # noqa: PTH100 - a link must keep its own name
    for base in (root, Path(os.path.abspath(root))):  # noqa: PTH100
        if path.is_relative_to(base):
            return path.relative_to(base)
    return path


def cases_of(records: Iterable[Mapping[str, Any]], texts: Iterable[str]) -> Iterator[JudgedCase]:
    """Yield the judged case of each check.

    Args:
        records: The record of each check.
        texts: The text of each check's findings.
    """
    for record, text in zip(records, texts, strict=True):
        group, _, name = record["nodeid"].rpartition("::")
        outcome = {"failed": "failed", "skipped": "skipped"}.get(record["outcome"], "passed")
        shown = record["not_checked"] if outcome == "skipped" else text
        yield JudgedCase(group.replace("::", "."), name, outcome, shown, record["findings"], record["seconds"])  # type: ignore[arg-type]


def message_of(cause: Mapping[str, Any]) -> str:
    """Return a cause in a few lines, without its tokens and its row."""
    count = f" ({cause['count']} findings)" if cause["count"] > 1 else ""
    place = f"{cause['place']}: " if cause["place"] else ""
    lines = [f"{place}{cause['found']}{count}", f"check: {cause['check']}"]
    lines += [f"expected: {cause['expected']}"] if cause["expected"] else []
    return redacted("\n".join([*lines, f"fix: {cause['fix']}"]))
