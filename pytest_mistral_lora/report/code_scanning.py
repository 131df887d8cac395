"""Findings for code scanning, as a log in SARIF 2.1.0."""

from __future__ import annotations

import hashlib
from typing import Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.report.judged import FilePlace, Judged, file_place, message_of
from pytest_mistral_lora.report.secrets import redacted

_SARIF = "https://json.schemastore.org/sarif-2.1.0.json"


def sarif_data(judged: Judged) -> dict[str, Any]:
    """Return a SARIF 2.1.0 log with a result for each cause, as plain JSON data."""
    from pytest_mistral_lora.report.page import rule_url

    rules = {
        cause["rule"]: {
            "id": cause["rule"],
            "shortDescription": {"text": cause["title"]},
            "fullDescription": {"text": cause["why"]},
            "help": {"text": cause["fix"]},
            **({"helpUri": url} if (url := rule_url(cause["rule"])) else {}),
            "defaultConfiguration": {"level": _level(cause)},
        }
        for cause in reversed(judged.causes)
    }
    # GitHub refuses a whole log if one result has no file; the artifact that was judged is the nearest one
    subject = file_place(judged.subject) or FilePlace(file_place(".").file)  # type: ignore[union-attr]
    results = []
    for cause in judged.causes:
        place = file_place(cause["place"]) or subject
        location: dict[str, Any] = {"artifactLocation": {"uri": redacted(place.uri)}}
        if place.line:
            location["region"] = {"startLine": place.line}
        results.append(
            {
                "ruleId": cause["rule"],
                "level": _level(cause),
                "message": {"text": message_of(cause)},
                "locations": [{"physicalLocation": location}],
                # the same for a cause in each run, wherever its first row has moved to
                "partialFingerprints": {"cause/v1": hashlib.sha256(redacted(cause["cause"]).encode()).hexdigest()},
            }
        )
    driver = {"name": "pytest-mistral-lora", "version": __version__, "rules": list(rules.values())}
    return {"$schema": _SARIF, "version": "2.1.0", "runs": [{"tool": {"driver": driver}, "results": results}]}


def _level(cause: Any) -> str:
    return "error" if cause["severity"] == "error" else "note"
