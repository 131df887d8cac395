"""What a check reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pytest_mistral_lora.conformance.rules import RULES, Rule, Severity


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that is broken at a place.

    Attributes:
        rule: Id of the rule.
        found: What was found there.
        place: File, line, row, turn or token.
        expected: What was expected instead.
        detail: Lines that show it, such as the tokens around the first difference.
        row: The chat row as one line of JSON that can be pasted into a dataset, or empty.
    """

    rule: str
    found: str
    place: str = ""
    expected: str = ""
    detail: str = ""
    row: str = ""

    @property
    def severity(self) -> Severity:
        """`error` fails the check; `note` only under `--mistral-strict`."""
        rule: Rule = RULES[self.rule]
        return rule.severity

    def text(self) -> str:
        """Return the finding for a terminal; the first line starts with the rule's id."""
        rule = RULES[self.rule]
        where = f"{self.place}: " if self.place else ""
        lines = [f"{self.rule} {where}{self.found}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        lines += [f"  {line}" for line in self.detail.splitlines()]
        if self.row:
            lines.append(f"  row:      {self.row}")
        lines += [f"  rule:     {rule.title}", f"  why:      {rule.why}", f"  fix:      {rule.fix}"]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain JSON data, with what its rule says."""
        rule: Rule = RULES[self.rule]
        said = {name: getattr(rule, name) for name in ("severity", "title", "why", "fix", "source")}
        return {**asdict(self), **said}


@dataclass(frozen=True, slots=True)
class Result:
    """What one check came to.

    Attributes:
        findings: Broken rules; empty where all is well.
        not_checked: Why something could not be checked: a state of its own, never a pass.
        facts: Figures worth keeping in a report, such as which named deviations were seen.
    """

    findings: tuple[Finding, ...] = ()
    not_checked: str = ""
    facts: tuple[tuple[str, Any], ...] = ()
