"""Subject `encoded`: rows as some trainer encoded them, against mistral-common, in one pass over the file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.encoded.audit import Audit
from pytest_mistral_lora.conformance.encoded.parts import (
    FILE_CLASSES,
    ID_CLASSES,
    LABEL_CLASSES,
    ORDER_CLASSES,
    PACKING_CLASSES,
    TEXT_CLASSES,
)
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import EncodedTarget

KEPT = 20
"""Findings of a rule that are kept whole; more are counted."""

CASES = {
    "file": FILE_CLASSES,
    "rows-complete": ORDER_CLASSES,
    "ids": ID_CLASSES,
    "labels": LABEL_CLASSES,
    "packing": PACKING_CLASSES,
    "supervised-text": TEXT_CLASSES,
}
"""Every check of the subject, and the rules that it reports."""
_OF_ROWS = ("ids", "labels", "packing", "supervised-text")


def checks(target: EncodedTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an encoded-rows file; the first that runs reads the file for all of them."""
    for case, rules in CASES.items():
        yield Check(target, "encoded", case, partial(_judge, target, case, rules))


def _judge(target: EncodedTarget, case: str, rules: Collection[str]) -> Result:
    report = _report(target)
    findings = tuple(finding for rule in rules for finding in report.of(rule))
    states = report.audit.states
    judged = states["sound"] + states["wrong"]
    if not findings and not judged and case in _OF_ROWS:
        return Result(not_checked="no row of the file can be judged")
    facts = {"rows": states.total(), "judged": judged, "wrong": states["wrong"], "packed": report.audit.packed}
    return Result(findings, facts=tuple(facts.items()))


def _report(target: EncodedTarget) -> Report:
    if "encoded" not in target._loaded:
        target._loaded["encoded"] = Report.read(target.file, target.oracle, target.dataset)
    report: Report = target._loaded["encoded"]
    return report


@dataclass
class Report:
    """What an audit came to, in bounded memory.

    Attributes:
        audit: The audit, when it has run.
        kept: The first findings of each rule.
    """

    audit: Audit
    kept: dict[str, list[Finding]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, oracle: Oracle, dataset: tuple[Path, ...] = ()) -> Report:
        """Audit a file.

        Raises:
            InputError: If it cannot be opened.
        """
        report = cls(Audit(path, oracle, dataset))
        for verdict in report.audit.verdicts():
            for finding in verdict.findings:
                kept = report.kept.setdefault(finding.rule, [])
                if len(kept) < KEPT:
                    kept.append(finding)
        return report

    def of(self, rule: str) -> Iterator[Finding]:
        """Yield the findings of a rule; what is more than is kept is one finding that counts it."""
        kept = self.kept.get(rule, [])
        yield from kept
        more = self.audit.counts[rule] - len(kept)
        if more:
            yield Finding(rule, f"… and {more} more", str(self.audit.path))


def file_findings(path: Path, oracle: Oracle) -> Iterator[Finding]:
    """Yield the findings of an encoded-rows file: of every row, and of the file.

    Raises:
        RowsError: After the last finding, if lines are not encoded rows.
        InputError: If the file cannot be opened.
    """
    audit = Audit(path, oracle)
    for verdict in audit.verdicts():
        yield from (finding for finding in verdict.findings if finding.rule != "ML501")
    audit.raise_unreadable()


def injection_findings(row: Row, input_ids: Sequence[int], oracle: Oracle) -> Iterator[Finding]:
    """Yield one finding for each control token that is there more or less often than the structure needs."""
    controls = oracle.control_tokens
    needed = Counter(token for token in oracle.encode(row).input_ids if token in controls)
    found = Counter(token for token in input_ids if token in controls)
    for token in sorted(needed | found):
        if needed[token] != found[token]:
            what = f"{controls[token]} (id {token}) {found[token]} times"
            yield Finding("ML106", what, row.place, f"{needed[token]} times", row=row.to_jsonl())
