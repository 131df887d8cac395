"""The file of a report, `.json`, `.html` or `.md`: its data, its form, and the page of rows beside it."""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.escaping import safe_json
from pytest_mistral_lora.records.files import beginning, put_text, require_writable
from pytest_mistral_lora.records.goldens import library_versions
from pytest_mistral_lora.records.secrets import redacted
from pytest_mistral_lora.report.lines import commands_in
from pytest_mistral_lora.report.row_lines import with_rows
from pytest_mistral_lora.report.secrets import public_finding

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.token_rows import TokenRow


SUFFIXES = (".json", ".html", ".md")
"""The endings of the name of a report: each front writes the same forms."""
SCHEMA_VERSION = 1
"""Version of the report's form; it grows if a key is removed or changes its meaning."""


@dataclass(frozen=True, slots=True)
class RunFacts:
    """The facts of a run that its report records.

    Attributes:
        command: The command line.
        started: The time of its start.
        seconds: Its duration.
        code: `commit` and `dirty` of its repository, or None.
        project: The name of the folder where it ran.
    """

    command: str
    started: datetime
    seconds: float
    code: Mapping[str, Any] | None
    project: str = ""


def report_data(
    records: Sequence[Mapping[str, Any]],
    exit_status: int,
    run: RunFacts,
    *,
    verdict: str,
    causes: Sequence[Mapping[str, Any]],
    deselected: int,
    not_run: int,
    known_faults: Sequence[str],
) -> dict[str, Any]:
    """Return the report as plain JSON data.

    Args:
        records: The outcome of each check that ran, as plain data.
        exit_status: The exit code.
        run: The facts of the run.
        verdict: The last line for people.
        causes: The findings by cause: the simplest finding of each, with its check, its number and the others' names.
        deselected: Number of checks left out by `-k`, `-m` or `--lf`.
        not_run: Number of selected checks that did not run, because of `-x` or an interruption.
        known_faults: A line for each known fault of the installed libraries that can be a cause.
    """
    counts = Counter(record["outcome"] for record in records)
    # by the name of the check: a cause has only the name
    commands = {record["nodeid"].partition("::")[2]: record["commands"] for record in records}
    checks = []
    for record in records:
        findings = [public_finding(finding) for finding in record["findings"]]
        for finding in findings:
            finding.pop("tokens", None)  # findings of one cause would repeat the same table
        checks.append({**record, "findings": findings})
    data = {
        "schema_version": SCHEMA_VERSION,
        "pytest_mistral_lora": __version__,
        # two reports can only be compared if they name the versions that computed their ids
        "libraries": library_versions(),
        "known_faults": [*known_faults],
        "python": platform.python_version(),
        "started": run.started.isoformat(timespec="seconds"),
        "seconds": round(run.seconds, 3),
        "project": run.project,
        "command": run.command,
        "code": run.code,
        "verdict": verdict,
        "exit_status": exit_status,
        "counts": {
            "passed": counts["passed"],
            "failed": counts["failed"],
            "known": counts["known"],
            "not_checked": counts["skipped"],
            "deselected": deselected,
            "not_run": not_run,
        },
        "causes": [
            _with_commands(public_finding(cause), commands.get(cause["check"], {})) for cause in with_rows(causes)
        ],
        "checks": sorted(checks, key=lambda record: record["nodeid"]),
    }
    return redacted(data)


def _with_commands(cause: Mapping[str, Any], of_check: Mapping[str, str]) -> dict[str, Any]:
    """Return a cause with its commands: to repeat its check, to fix it by its rule's advice, to explain the rule."""
    explain = f"mistral-lora rules {cause['rule']}"
    return {**cause, "commands": {**of_check, "fix": commands_in(cause["fix"]), "explain": explain}}


def rows_page(report: Path) -> Path:
    """Return the path of the page beside a report, with the tokens of failed rows."""
    return report.with_name(f"{report.stem}.rows.html")


def require_report_file(path: Path) -> Path:
    """Return the path of a report, if it and the page beside it can be written and overwrite nothing else.

    Raises:
        InputError: If its name ends otherwise; or as for `require_writable`: of existing files, only an earlier report
            may be replaced.
    """
    if path.suffix not in SUFFIXES:
        raise InputError(f"{path.name!r}", expected=f"a name that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    from pytest_mistral_lora.report.pages import is_report_page, is_tokens_page

    require_writable(path, {".html": is_report_page, ".md": _is_markdown}.get(path.suffix, _is_report))
    require_writable(rows_page(path), is_tokens_page)
    return path


def _is_markdown(file: Path) -> bool:
    from pytest_mistral_lora.report.markdown import MARK

    return beginning(file).startswith(MARK)


def _is_report(file: Path) -> bool:
    return re.match(r'\{\s*"schema_version": \d+,\s*"pytest_mistral_lora": ', beginning(file)) is not None


def write_report(path: Path, data: Mapping[str, Any], rows: Sequence[TokenRow] = ()) -> None:
    """Write a report atomically, and beside it a page with the tokens of the failed rows.

    Args:
        path: A file; HTML or Markdown if its name ends in `.html` or `.md`, otherwise JSON.
        data: The result of `report_data`.
        rows: The failed rows.

    Raises:
        InputError: If a file cannot be written, for example because the disk is full, or it exists and is not a report.
    """
    from pytest_mistral_lora.report.pages import html_page, tokens_page

    require_report_file(path)
    beside = rows_page(path)
    # rows of an earlier report under the same name would look like those of this report
    beside.unlink(missing_ok=True)
    if rows:
        notes = (f"Each row as mistral-common encodes it; below its tokens, those that {path.name} reports.",)
        put_text(beside, tokens_page(rows, heading="Rows as tokens", notes=notes))
    if path.suffix == ".html":
        text = html_page(data, rows_page=beside.name if rows else "")
    elif path.suffix == ".md":
        from pytest_mistral_lora.report.markdown import report_markdown

        text = report_markdown(data)
    else:
        text = f"{safe_json(data, indent=2, allow_nan=False)}\n"
    put_text(path, text)
