"""A verdict as Markdown: for the summary of a job, and as a report for a pull request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pytest_mistral_lora.escaping import code_block, code_span, in_markdown
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.report.judged import Judged, cases_of, message_of
from pytest_mistral_lora.report.outcomes import RecordedOutcome
from pytest_mistral_lora.report.secrets import public_text

LONGEST = 900_000
"""The most bytes of a summary; GitHub refuses more than a megabyte, and then shows nothing."""
MARK = "<!-- pytest-mistral-lora, report -->"
"""The first line of a report, by which it is known as one."""


def verdict_markdown(judged: Judged, room: int = LONGEST) -> str:
    """Return a table of everything judged, and the text of each cause. Texts of the judged files are in code.

    Args:
        judged: The verdict.
        room: The most bytes; causes for which there is no room are only counted.
    """
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
    size = len(text.encode())
    for cause in judged.causes:
        body = code_block(public_text(cause["text"], [cause]))
        mark = "❌" if cause["severity"] == "error" else "📝"
        heading = f"{mark} {cause['rule']}: {in_markdown(cause['fault'])}"
        part = f"\n### {heading}\n\n{code_span(redacted(cause['check']))}\n\n{body}\n"
        if size + len(part.encode()) > room:
            hidden += 1
            continue
        text, size = text + part, size + len(part.encode())
    return text + (f"\n… and {hidden} more causes, for which there is no room here.\n" if hidden else "\n")


def report_markdown(data: Mapping[str, Any]) -> str:
    """Return the result of `report_data` as Markdown, each fix whole."""
    causes = [{**cause, "text": "\n".join([message_of(cause), cause["detail"]]).rstrip()} for cause in data["causes"]]
    cases = [*cases_of(map(RecordedOutcome.of, data["checks"]))]
    return f"{MARK}\n{verdict_markdown(Judged(data['command'], causes, cases, data['verdict'], data['known_faults']))}"
