"""The closed list of rules, read from `rules/<subject>.toml`. An id never changes its meaning."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Severity = Literal["error", "note"]

_SUBJECTS = ("template", "mask", "tokenizer", "train", "adapter", "encoded", "dataset", "manifest", "transcript")
"""The subjects in the order of the first digit of their rules' ids: ML0xx to ML8xx."""


@dataclass(frozen=True, slots=True)
class RuleExample:
    """An artifact that breaks the rule, and its finding, as recorded from a mutant of the tests.

    Attributes:
        fault: The mistake, in one sentence.
        finding: The finding without its row, its table and the text of its rule.
        command: The command that fixes the artifact, or shows the tokens.
        sound: The same artifact without the mistake, in one sentence.
        excerpt: The lines of a file or of a script that have the mistake, if it is not in the row.
        row: The row that breaks the rule, as one line of JSON; empty if the subject is not a row.
        table: Tokens and labels around the first difference, marked with `>`; empty if there is none.
    """

    fault: str
    finding: str
    command: str
    sound: str
    excerpt: str = ""
    row: str = ""
    table: str = ""

    @property
    def report(self) -> str:
        """The finding with its table, as the report prints them."""
        return "\n".join([self.finding, *(f"  {line}" for line in self.table.splitlines())])


@dataclass(frozen=True, slots=True)
class Rule:
    """One requirement on an artifact.

    Attributes:
        id: `ML` and three digits; the first digit stands for the subject.
        title: The requirement, in one sentence.
        subject: The subject of the suite that checks it.
        why: The consequence of breaking it.
        fix: The way to mend the artifact.
        source: The thread, specification or reference code that the rule comes from.
        severity: `error` fails a check; `note` is shown, and fails only with `--mistral-strict`.
        example: A broken artifact with its finding.
    """

    id: str
    title: str
    subject: str
    why: str
    fix: str
    source: str
    example: RuleExample
    severity: Severity = "error"

    def text(self) -> str:
        """Return the rule with its reason and its example, for a terminal."""
        values = {
            "subject": self.subject,
            "severity": self.severity,
            "why": self.why,
            "fix": self.fix,
            "source": self.source,
            "example": self.example.fault,
        }
        lines = [f"{self.id} {self.title}", *(f"  {name + ':':<9} {text}" for name, text in values.items())]
        for part in (self.example.excerpt, self.example.row, self.example.report, f"$ {self.example.command}"):
            lines += ["", *(f"    {line}" for line in part.splitlines())] if part else []
        return "\n".join([*lines, "", f"  {'sound:':<9} {self.example.sound}"])


class RuleTable(Mapping[str, Rule]):
    """Every rule by id. A lookup reads the file of one subject; iteration reads them all."""

    def __getitem__(self, rule_id: str) -> Rule:
        # Most runs have no finding or findings of one subject, and the nine files take 0.1 s to parse.
        digit = rule_id[2:3]
        if not digit.isdecimal() or int(digit) >= len(_SUBJECTS):
            raise KeyError(rule_id)
        return _read_rules(_SUBJECTS[int(digit)])[rule_id]

    def __iter__(self) -> Iterator[str]:
        return (rule_id for subject in _SUBJECTS for rule_id in _read_rules(subject))

    def __len__(self) -> int:
        return sum(len(_read_rules(subject)) for subject in _SUBJECTS)


RULES = RuleTable()
"""Every rule, by id, in the order of the ids."""


@cache
def _read_rules(subject: str) -> dict[str, Rule]:
    with (Path(__file__).parent / "rules" / f"{subject}.toml").open("rb") as file:
        tables = tomllib.load(file)
    return {
        rule_id: Rule(id=rule_id, subject=subject, **{**table, "example": RuleExample(**table["example"])})
        for rule_id, table in tables.items()
    }
