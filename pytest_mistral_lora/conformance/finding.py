"""Findings: a rule that is broken at a place, and the table of the tokens around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.conformance.rule import RULES, Rule, Severity

__all__ = ["RULES", "Rule", "Severity"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A rule that is broken at a place.

    Attributes:
        rule: Id of the rule.
        found: The value, tokens or text that break it.
        place: File, line, row, turn or token.
        expected: The value that keeps it; empty if the rule's title is enough.
        detail: Lines with more, such as the tokens around the first difference.
        row: The chat row as one line of JSON that you can paste into a dataset, or empty.
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
        return RULES[self.rule].severity

    def text(self) -> str:
        """Return the finding for a terminal; the first line starts with the rule's id."""
        rule = RULES[self.rule]
        place = f"{self.place}: " if self.place else ""
        lines = [f"{self.rule} {place}{self.found}"]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        lines += [f"  {line}" for line in self.detail.splitlines()]
        # one line that can be pasted into a rows file, to reproduce the finding
        if self.row:
            lines.append(f"  row:      {self.row}")
        lines += [f"  rule:     {rule.title}", f"  why:      {rule.why}", f"  fix:      {rule.fix}"]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain JSON data, with the text of its rule but without the rule's example."""
        rule = RULES[self.rule]
        of_rule = {name: getattr(rule, name) for name in ("severity", "title", "why", "fix", "source")}
        return {**asdict(self), **of_rule}


def first_findings(findings: Sequence[Finding], most: int, place: str) -> list[Finding]:
    """Return the first findings of a rule; if there are more than `most`, with one that gives their number."""
    if len(findings) <= most:
        return list(findings)
    return [*findings[:most], Finding(findings[0].rule, f"… and {len(findings) - most} more", place)]


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of one check.

    Attributes:
        findings: The broken rules; empty if all is well.
        not_checked: The reason why something could not be checked: a state of its own, never a pass.
        facts: Figures worth keeping in a report, such as which named deviations were seen.
    """

    findings: tuple[Finding, ...] = ()
    not_checked: str = ""
    facts: tuple[tuple[str, Any], ...] = ()


AROUND = 5
"""Tokens shown on each side of the first difference."""

Ids = Sequence[int]
Labels = Sequence[int] | None


def show_difference(expected: tuple[Ids, Labels], found: tuple[Ids, Labels], piece: Callable[[int], str]) -> str:
    """Return a table of the tokens around the first difference in ids or labels; empty if there is none.

    Args:
        expected: mistral-common's `input_ids` and `labels`; labels of None are not compared.
        found: The `input_ids` and `labels` to compare with them.
        piece: Gives the vocabulary's spelling of an id.
    """
    # after an insertion every later token differs, so only the first difference is marked and shown
    at = first_difference(expected, found)
    if at is None:
        return ""
    rows = [("token", "expected", "label", "found", "label")]
    for index in range(max(0, at - AROUND), min(max(len(expected[0]), len(found[0])), at + AROUND + 1)):
        mark = "> " if index == at else "  "
        rows.append((f"{mark}{index}", *_cell(expected, index, piece), *_cell(found, index, piece)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lengths = f"{len(expected[0])} tokens expected, {len(found[0])} found; the first difference is at token {at}"
    return "\n".join([lengths, *lines])


def first_difference(expected: tuple[Ids, Labels], found: tuple[Ids, Labels]) -> int | None:
    """Return the first index at which ids, or labels if both have them, differ; None if they are equal."""
    for index in range(max(len(expected[0]), len(found[0]))):
        if index >= min(len(expected[0]), len(found[0])) or expected[0][index] != found[0][index]:
            return index
        if expected[1] is not None and found[1] is not None and expected[1][index] != found[1][index]:
            return index
    return None


def _cell(encoded: tuple[Ids, Labels], index: int, piece: Callable[[int], str]) -> tuple[str, str]:
    ids, labels = encoded
    if index >= len(ids):
        return "(end)", ""
    token = f"{ids[index]} {piece(ids[index])!r}"
    if labels is None or index >= len(labels):
        return token, "?"
    if labels[index] == IGNORE_INDEX:
        return token, "-100"
    return token, "train" if labels[index] == ids[index] else f"train {labels[index]}"
