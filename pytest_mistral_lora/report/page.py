"""The report of a run as one HTML page that needs nothing else."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from typing import Any

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
