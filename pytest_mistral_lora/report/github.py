"""Output for a workflow of GitHub: annotations beside the line at fault, and the summary of a job."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.escaping import code_block, code_span, in_markdown, printable
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.report.judged import Judged, file_place, message_of
from pytest_mistral_lora.report.secrets import public_text

_LONGEST_MESSAGE = 4000
_LONGEST_SUMMARY = 900_000
"""The most bytes of a summary; GitHub refuses more than a megabyte, and then shows nothing."""


def in_workflow() -> bool:
    """Return whether this process runs in a GitHub workflow, which reads commands from its output."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def annotation_lines(causes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a workflow command for each cause, so that GitHub shows it beside its line.

    Args:
        causes: The findings by cause, as `Judged` has them.
    """
    lines = []
    for cause in causes:
        place = file_place(Place.from_json(cause["structured"]["place"]))
        properties: dict[str, object] = {"title": f"{cause['rule']} {cause['fault']}"}
        if place is not None:
            properties = {"file": place.file, **({"line": place.line} if place.line else {}), **properties}
        shown = ",".join(f"{name}={_escaped(redacted(str(value)), ':,')}" for name, value in properties.items())
        kind = "error" if cause["severity"] == "error" else "notice"
        lines.append(f"::{kind} {shown}::{_escaped(message_of(cause)[:_LONGEST_MESSAGE])}")
    return lines


def _escaped(text: str, more: str = "") -> str:
    # a workflow command is one line: a property ends at a comma, and the properties end at a colon
    return re.sub(f"[%\n{more}]", lambda found: f"%{ord(found[0]):02X}", printable(text))


def add_job_summary(judged: Judged) -> None:
    """Append the verdict to the summary of the job, if GitHub has named a file for it (`GITHUB_STEP_SUMMARY`).

    It is Markdown: a table of everything judged, and the text of each cause. Texts of the judged files are in code.
    """
    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return
    lines = [f"## {in_markdown(judged.command)}", ""]
    for line in (judged.verdict, *judged.known):
        lines += [code_span(line), ""]
    lines += ["| judged | passed | failed | not checked |", "|---|--:|--:|--:|"]
    counts: dict[str, Counter[str]] = {}
    for case in judged.cases:
        counts.setdefault(case.group, Counter())[case.outcome] += 1
    for group, count in counts.items():
        numbers = (str(count[name] or "-") for name in ("passed", "failed", "skipped"))
        lines.append(f"| {code_span(redacted(group), in_table=True)} | {' | '.join(numbers)} |")
    text, hidden = "\n".join([*lines, ""]), 0
    # all commands of a step share the file
    size = len(text.encode()) + _size_of(Path(file))
    for cause in judged.causes:
        body = code_block(public_text(cause["text"], [cause]))
        mark = "❌" if cause["severity"] == "error" else "📝"
        heading = f"{mark} {cause['rule']}: {in_markdown(cause['fault'])}"
        part = f"\n### {heading}\n\n{code_span(redacted(cause['check']))}\n\n{body}\n"
        if size + len(part.encode()) > _LONGEST_SUMMARY:
            hidden += 1
            continue
        text, size = text + part, size + len(part.encode())
    text += f"\n… and {hidden} more causes, for which there is no room here.\n" if hidden else "\n"
    try:
        with Path(file).open("a", encoding="utf-8") as summary:
            summary.write(text)
    except OSError as error:  # for example in a container without the folder: the verdict and its exit code count more
        sys.stderr.write(f"note: GITHUB_STEP_SUMMARY cannot be written: {error}\n")


def _size_of(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # it is written next, and then reported
        return 0
