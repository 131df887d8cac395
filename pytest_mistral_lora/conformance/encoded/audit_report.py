"""An audit as it is printed: verdicts as they come, then what was found how often."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from pytest_mistral_lora.conformance.encoded.audit import Audit, Verdict
from pytest_mistral_lora.conformance.encoded.fault_classes import CLASSES
from pytest_mistral_lora.conformance.rules import RULES


def write_text(audit: Audit, out: TextIO, show: int) -> bool:
    """Run an audit and print it for people; at most `show` findings of a class are printed, all are counted.

    Returns:
        Whether something that is an error was found.
    """
    shown: Counter[str] = Counter()
    for verdict in with_progress(audit):
        texts = []
        for finding in verdict.findings:
            shown[finding.rule] += 1
            texts += [finding.text()] if shown[finding.rule] <= show else []
        if texts:
            out.write(_verdict_line(verdict) + "\n" + "\n".join(texts) + "\n\n")
    out.write(_table(audit, shown, show))
    return _failed(audit)


def write_json(audit: Audit, out: TextIO) -> bool:
    """Run an audit and print it as JSON Lines, a finding a line, then the summary.

    Returns:
        Whether something that is an error was found.
    """
    for verdict in with_progress(audit):
        for finding in verdict.findings:
            extra = {"class": CLASSES[finding.rule], "index": verdict.index, "state": verdict.state}
            out.write(json.dumps({**finding.to_json(), **extra}, ensure_ascii=False) + "\n")
    out.write(json.dumps({"summary": summary(audit)}, ensure_ascii=False) + "\n")
    return _failed(audit)


def summary(audit: Audit) -> dict[str, Any]:
    """Return what an audit that has run came to, as plain JSON data."""
    classes = [{"rule": rule, "class": CLASSES[rule], "count": n} for rule, n in sorted(audit.counts.items())]
    return {
        "rows": audit.states.total(),
        "sound": audit.states["sound"],
        "wrong": audit.states["wrong"],
        "not_judged": audit.states["not judged"],
        "packed": audit.packed,
        "tokens": audit.tokens,
        "supervised_tokens": audit.supervised,
        "findings": audit.counts.total(),
        "classes": classes,
    }


def _failed(audit: Audit) -> bool:
    return any(RULES[rule].severity == "error" for rule in audit.counts)


def _verdict_line(verdict: Verdict) -> str:
    classes = ", ".join(dict.fromkeys(CLASSES[finding.rule] for finding in verdict.findings))
    what = "file" if verdict.index is None else f"row {verdict.index}"
    return f"{verdict.place}: {what}: {verdict.state}: {classes}"


def _table(audit: Audit, shown: Counter[str], show: int) -> str:
    lines = [f"{'rule':<6}  {'class':<26}  {'found':>9}"] if audit.counts else []
    for rule, count in sorted(audit.counts.items()):
        rest = f"  {show} shown" if shown[rule] > show else ""
        lines.append(f"{rule:<6}  {CLASSES[rule]:<26}  {count:>9}{rest}")
    data = summary(audit)
    rows = f"{data['rows']} rows: {data['sound']} sound, {data['wrong']} wrong, {data['not_judged']} not judged"
    tokens = f"{data['supervised_tokens']} of {data['tokens']} tokens are trained on"
    found = f"{data['findings']} finding{'' if data['findings'] == 1 else 's'}"
    return "\n".join([*lines, rows, tokens, found]) + "\n"


def with_progress(audit: Audit) -> Iterator[Verdict]:
    """Yield an audit's verdicts, with a progress bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from audit.verdicts()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rows", total=_count_lines(audit.path))
        for verdict in audit.verdicts():
            progress.advance(task)
            yield verdict


def _count_lines(path: Path) -> int | None:
    """Return the lines of a file, and one for the verdict on it; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b"")) + 1
    except OSError:
        return None
