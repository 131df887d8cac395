"""The report of a run as JSON."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.records.files import write_json
from pytest_mistral_lora.records.goldens import library_versions

SCHEMA_VERSION = 1


def write(path: Path, outcomes: list[dict[str, Any]], exit_status: int, *, deselected: int, not_run: int) -> None:
    """Write the report, atomically.

    Args:
        path: The file.
        outcomes: One record for each check: `nodeid`, `outcome` (`passed`, `failed`, `skipped`), `seconds`, `target`,
            `subject`, `case`, `findings`, `not_checked`, `facts`.
        exit_status: pytest's exit code.
        deselected: How many checks were left out by `-k`, `-m` or `--lf`.
        not_run: How many were chosen and did not run, by `-x` or an interruption.
    """
    counts = Counter(outcome["outcome"] for outcome in outcomes)
    data = {
        "schema_version": SCHEMA_VERSION,
        "pytest_mistral_lora": __version__,
        "libraries": library_versions(),
        "exit_status": exit_status,
        "counts": {
            "passed": counts["passed"],
            "failed": counts["failed"],
            "not_checked": counts["skipped"],
            "deselected": deselected,
            "not_run": not_run,
        },
        "checks": sorted(outcomes, key=lambda outcome: outcome["nodeid"]),
    }
    write_json(path, data)
