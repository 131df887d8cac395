"""Output for a workflow of GitHub: annotations beside the line at fault, and the summary of a job."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.report.judged import Judged, file_place, message_of
from pytest_mistral_lora.report.markdown import LONGEST, verdict_markdown

_LONGEST_MESSAGE = 4000


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

    All commands of a step share the file.
    """
    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return
    text = verdict_markdown(judged, LONGEST - _size_of(Path(file)))
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
