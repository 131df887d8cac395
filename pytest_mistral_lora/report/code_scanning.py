"""Findings for the machines that show them beside code: annotations of GitHub, and SARIF for code scanning."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pytest_mistral_lora import __version__

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"
_PLACE = re.compile(r"(?P<file>[^,]+?)(?::(?P<line>\d+))?(?:, .*)?", re.DOTALL)


def github_lines(causes: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a workflow command for each cause, by which GitHub shows it beside its line.

    Args:
        causes: The findings by cause, as `report_data` takes them.
    """
    lines = []
    for cause in causes:
        file, line = _file_and_line(cause["place"])
        properties = {"file": file, "line": line, "title": f"{cause['rule']} {cause['title']}"}
        shown = ",".join(f"{name}={_escape(str(value), ':,')}" for name, value in properties.items() if value)
        kind = "error" if cause["severity"] == "error" else "notice"
        lines.append(f"::{kind} {shown}::{_escape(_message(cause))}")
    return lines


def sarif_data(causes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a SARIF 2.1.0 log with a result for each cause, as plain JSON data.

    Args:
        causes: The findings by cause, as `report_data` takes them.
    """
    rules = {
        cause["rule"]: {
            "id": cause["rule"],
            "shortDescription": {"text": cause["title"]},
            "fullDescription": {"text": cause["why"]},
            "help": {"text": cause["fix"]},
        }
        for cause in causes
    }
    results = []
    for cause in causes:
        file, line = _file_and_line(cause["place"])
        location: dict[str, Any] = {"artifactLocation": {"uri": file}}
        if line:
            location["region"] = {"startLine": line}
        results.append(
            {
                "ruleId": cause["rule"],
                "level": "error" if cause["severity"] == "error" else "note",
                "message": {"text": _message(cause)},
                "locations": [{"physicalLocation": location}] if file else [],
            }
        )
    driver = {"name": "pytest-mistral-lora", "version": __version__, "rules": list(rules.values())}
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _message(cause: Mapping[str, Any]) -> str:
    count = f" ({cause['count']} findings)" if cause["count"] > 1 else ""
    lines = [f"{cause['found']}{count}", f"check: {cause['check']}"]
    lines += [f"expected: {cause['expected']}"] if cause["expected"] else []
    return "\n".join([*lines, f"fix: {cause['fix']}"])


def _file_and_line(place: str) -> tuple[str, int]:
    match = _PLACE.fullmatch(place)
    return (match["file"], int(match["line"] or 0)) if match else ("", 0)


def _escape(text: str, more: str = "") -> str:
    # a workflow command is one line, in which a property ends at a comma and the properties end at a colon
    return re.sub(f"[%\r\n{more}]", lambda found: f"%{ord(found[0]):02X}", text)
