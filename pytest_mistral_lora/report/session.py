"""The report of a run as one HTML page that needs nothing else."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.records.files import write_json, write_text
from pytest_mistral_lora.records.goldens import library_versions

_OUTCOMES = {"passed": "passed", "failed": "failed", "known": "known", "skipped": "not checked"}
_ORDER = ("failed", "known", "skipped", "passed")


def page(data: dict[str, Any]) -> str:
    """Return the page for what `report_data` returns.

    Everything that comes from data is escaped: a row's text may be HTML.
    """
    from jinja2 import Environment, StrictUndefined

    source = files("pytest_mistral_lora.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    checks = sorted(data["checks"], key=lambda check: _ORDER.index(check["outcome"]))
    return environment.from_string(source).render(
        data=data, outcomes=_OUTCOMES, table=_table(data["checks"]), shown=[one for one in checks if _is_shown(one)]
    )


def _table(checks: list[dict[str, Any]]) -> dict[tuple[str, str], Counter[str]]:
    """Count the outcomes of each target and subject, in the order in which they were judged."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for check in checks:
        counts.setdefault((check["target"], check["subject"]), Counter())[check["outcome"]] += 1
    return counts


def _is_shown(check: dict[str, Any]) -> bool:
    return bool(check["outcome"] != "passed" or check["findings"])


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
        write_text(path, page(data))
    else:
        write_json(path, data)
