"""The report of a run: as plain data, written as JSON or as a page."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.records.goldens import library_versions

SCHEMA_VERSION = 1


def report_data(outcomes: list[dict[str, Any]], exit_status: int, *, deselected: int, not_run: int) -> dict[str, Any]:
    """Return the report as plain JSON data.

    Args:
        outcomes: One record for each check: `nodeid`, `outcome` (`passed`, `failed`, `known`, `skipped`), `seconds`,
            `target`, `subject`, `case`, `findings`, `known`, `not_checked`, `facts`.
        exit_status: pytest's exit code.
        deselected: How many checks were left out by `-k`, `-m` or `--lf`.
        not_run: How many were chosen and did not run, by `-x` or an interruption.
    """
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    return {
        "schema_version": SCHEMA_VERSION,
        "pytest_mistral_lora": __version__,
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
        "checks": sorted(outcomes, key=lambda outcome: outcome["nodeid"]),
    }


def write(path: Path, data: dict[str, Any]) -> None:
    """Write a report atomically, in the form that the name's suffix says.

    Args:
        path: A file whose name ends in `.json` or `.html`.
        data: What `report_data` returns.
    """
    if path.suffix == ".html":
        from pytest_mistral_lora.report.page import page

        write_text(path, page(data))
    else:
        write_json(path, data)
