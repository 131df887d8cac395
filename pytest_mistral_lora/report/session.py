"""The report of a session that ran the suite: plain data, a file of JSON or HTML, and the table in the terminal.

A record is one check as plain data: `nodeid`, `outcome` (a key of `OUTCOMES`), `seconds`, `target`, `subject`, `case`,
`findings`, `known`, `not_checked`, `facts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.resources import files
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.records.goldens import library_versions

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1
"""Version of the report's form; it grows if a key changes its meaning or goes."""

OUTCOMES = {"passed": "passed", "failed": "failed", "known": "known", "skipped": "not checked"}
"""Each outcome of a check, and its name for people. pytest's word for a check that could not run is *skipped*."""

_WORST_FIRST = ("failed", "known", "skipped", "passed")
# a narrower terminal than this breaks every row of a table; letting the terminal wrap long lines reads better
_LEAST_WIDTH = 60


def report_data(
    records: Sequence[dict[str, Any]], exit_status: int, *, deselected: int, not_run: int
) -> dict[str, Any]:
    """Return the report as plain JSON data.

    Args:
        records: One record for each check that ran.
        exit_status: pytest's exit code.
        deselected: Number of checks left out by `-k`, `-m` or `--lf`.
        not_run: Number of checks that were chosen and did not run, because of `-x` or an interruption.
    """
    counts = Counter(record["outcome"] for record in records)
    return {
        "schema_version": SCHEMA_VERSION,
        "pytest_mistral_lora": __version__,
        # two reports can only be compared if they name the versions under which their ids were computed
        "libraries": library_versions(),
        "exit_status": exit_status,
        "counts": {
            "passed": counts["passed"],
            "failed": counts["failed"],
            "known": counts["known"],
            "not_checked": counts["skipped"],
            "deselected": deselected,
            "not_run": not_run,
        },
        "checks": sorted(records, key=lambda record: record["nodeid"]),
    }


def write_report(path: Path, data: Mapping[str, Any]) -> None:
    """Write a report atomically.

    Args:
        path: A file; HTML if its name ends in `.html`, otherwise JSON.
        data: The result of `report_data`.
    """
    if path.suffix == ".html":
        write_text(path, html_page(data))
    else:
        write_json(path, data)


def html_page(data: Mapping[str, Any]) -> str:
    """Return the result of `report_data` as one HTML page that loads nothing else."""
    from jinja2 import Environment, StrictUndefined

    source = files("pytest_mistral_lora.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    # autoescape, because the text of a row may be HTML
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    checks = sorted(data["checks"], key=lambda record: _WORST_FIRST.index(record["outcome"]))
    shown = [record for record in checks if record["outcome"] != "passed" or record["findings"]]
    template = environment.from_string(source)
    return template.render(data=data, outcomes=OUTCOMES, table=_outcome_counts(data["checks"]), shown=shown)


def outcome_table(records: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """Return the lines of a table with the number of outcomes of each target and subject.

    Args:
        records: One record for each check that ran.
        width: Columns of the terminal.
    """
    from rich import box
    from rich.table import Table

    # few runs have known deviations: for all others the column is noise
    shown = [name for name in OUTCOMES if name != "known" or any(one["outcome"] == "known" for one in records)]
    table = Table("target", "subject", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in shown:
        table.add_column(OUTCOMES[name], justify="right")
    for (target, subject), count in _outcome_counts(records).items():
        table.add_row(target, subject, *(str(count[name] or "-") for name in shown))
    return table_lines(table, width)


def table_lines(table: Table, width: int) -> list[str]:
    """Return the lines of a table for a terminal of this width, without colours."""
    from rich.console import Console

    file = StringIO()
    Console(file=file, width=max(width, _LEAST_WIDTH), color_system=None).print(table)
    return [line.rstrip() for line in file.getvalue().splitlines() if line.strip()]


def _outcome_counts(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Counter[str]]:
    """Count the outcomes of each target and subject, in the order in which these first appear."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for record in records:
        counts.setdefault((record["target"], record["subject"]), Counter())[record["outcome"]] += 1
    return counts
