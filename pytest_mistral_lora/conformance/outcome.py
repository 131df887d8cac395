"""The outcome of one check of a session: a value, and its plain data for another process or a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pytest_mistral_lora.conformance.checks import ROOT, Check, Subject
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.known import Xfail, matching

State = Literal["passed", "failed", "known", "skipped"]
"""The end of a check; `known`: each error is a known deviation; `skipped`: the check could not judge."""


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """The outcome of one check, divided by the known deviations of its session.

    Attributes:
        target: The name of its target.
        subject: Its subject.
        case: Its name within target and subject.
        state: How it ended.
        findings: The findings that no known deviation covers.
        known: The known deviations that a finding matches.
        not_checked: The reason why something could not be checked; may be empty.
        facts: Figures worth keeping.
        seconds: Its duration.
        commands: Commands that repeat the check, by name.
    """

    target: str
    subject: Subject
    case: str
    state: State
    findings: tuple[Finding, ...] = ()
    known: tuple[Xfail, ...] = ()
    not_checked: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    commands: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def stopped(cls, check: Check) -> CheckOutcome:
        """Return the outcome of a check that stopped with an error, or has not ended yet."""
        return cls(check.target.name, check.subject, check.case, "failed")

    @property
    def name(self) -> str:
        """The check's part of the node id: `<target>::<subject>::<case>`."""
        return f"{self.target}::{self.subject}::{self.case}"

    @property
    def nodeid(self) -> str:
        """The node id of the check."""
        return f"{ROOT}::{self.name}"

    def failing(self, *, notes: bool) -> tuple[Finding, ...]:
        """Return the findings that fail the check.

        Args:
            notes: Whether notes fail.
        """
        return tuple(
            finding for finding in self.findings if (notes and not finding.is_newer) or finding.severity == "error"
        )

    def meets(self, xfail: Xfail) -> bool:
        """Return whether the check found a known deviation, accepted or not."""
        # an entry whose date has passed does not accept findings, but still matches them
        found = any(matching(finding, self.nodeid, (xfail,)) for finding in self.findings)
        return found or any(known.id == xfail.id for known in self.known)

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as plain JSON data."""
        return {
            "nodeid": self.nodeid,
            "outcome": self.state,
            "seconds": round(self.seconds, 4),
            "target": self.target,
            "subject": self.subject,
            "case": self.case,
            "findings": [finding.to_json() for finding in self.findings],
            "known": [{"id": xfail.id, "reason": xfail.reason} for xfail in self.known],
            "not_checked": self.not_checked,
            "facts": dict(self.facts),
            "commands": dict(self.commands) if self.findings else {},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CheckOutcome:
        """Return the outcome of the result of `to_json`; its known deviations have no place."""
        return cls(
            target=data["target"],
            subject=data["subject"],
            case=data["case"],
            state=data["outcome"],
            findings=tuple(map(Finding.from_json, data["findings"])),
            known=tuple(Xfail(known["id"], known["reason"], "") for known in data["known"]),
            not_checked=data["not_checked"],
            facts=data["facts"],
            seconds=data["seconds"],
            commands=data["commands"],
        )
