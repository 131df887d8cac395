"""Outcomes of checks without a run."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.outcome import CheckOutcome


def outcome_of(name: str, *findings: Finding, **values: Any) -> CheckOutcome:
    """Return the outcome of the check `<target>::<subject>::<case>`.

    It failed if it has an error, and was skipped if it has a reason.
    """
    target, subject, case = name.split("::", 2)
    state: Any = "skipped" if values.get("not_checked") else "passed"
    if any(finding.severity == "error" for finding in findings):
        state = "failed"
    subject_: Any = subject
    return CheckOutcome(target, subject_, case, **{"state": state, "findings": findings, **values})
