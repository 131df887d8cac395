"""What a rule is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "note"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule that an artifact must keep.

    Attributes:
        id: `ML` and three digits; the first digit is the subject's.
        title: What must hold, in one sentence.
        subject: The subject of the suite that checks it.
        why: What goes wrong where it is broken.
        fix: What to do about it.
        source: Where the rule comes from: a thread, a specification, the reference's code.
        severity: `error` fails a check; `note` is shown, and fails under `--mistral-strict` only.
        bad: Lines of Python that break the rule, in the names of the subject's workbench. The tests run them.
        good: The same lines as they should be: nothing is found.
    """

    id: str
    title: str
    subject: str
    why: str
    fix: str
    source: str
    severity: Severity = "error"
    bad: str = ""
    good: str = ""

    def text(self) -> str:
        """Return the rule with its reasons and its examples, for a terminal."""
        said = {"subject": self.subject, "severity": self.severity, "why": self.why, "fix": self.fix}
        lines = [f"{self.id} {self.title}", *(f"  {name + ':':<9} {text}" for name, text in said.items())]
        lines.append(f"  {'source:':<9} {self.source}")
        for name, example in (("broken:", self.bad), ("sound:", self.good)):
            lines += [f"  {name}", *(f"      {line}" for line in example.splitlines())]
        return "\n".join(lines)
