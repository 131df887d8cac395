"""The result of one pass over a dataset: columns of a few bytes a row, counts, and a bounded number of findings."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from pytest_mistral_lora.conformance.finding import Finding, rest_of_findings

SHOWN = 20
"""Findings of one rule that are kept; the others are counted."""

LONGEST = 2000
"""Characters of the longest text in a finding."""

# 128 bits: among a billion rows, two that are not equal have one digest with a chance of about 1 in 10**21
DIGEST_BYTES = 16
# a file of 2**40 rows would have tens of terabytes, and 24 bits are left for the number of the file
_LINE_BITS = 40


class BoundedFindings:
    """Findings by rule: the first of each are kept, all are counted."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Finding]] = {}
        self._total: Counter[str] = Counter()

    def __contains__(self, rule: str) -> bool:
        """Return whether a rule has findings."""
        return bool(self._total[rule])

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it if there is room; a text of a very long row is cut."""
        self._total[finding.rule] += 1
        if self.has_room(finding.rule):
            texts = {name: getattr(finding, name) for name in ("found", "place", "expected", "detail")}
            cut: dict[str, Any] = {name: f"{text[:LONGEST]} …" for name, text in texts.items() if len(text) > LONGEST}
            self._kept.setdefault(finding.rule, []).append(replace(finding, **cut))

    def has_room(self, rule: str) -> bool:
        """Return whether the next finding of a rule is kept."""
        return len(self._kept.get(rule, ())) < SHOWN

    def count(self, rule: str) -> None:
        """Count a finding that is not shown."""
        self._total[rule] += 1

    def extend(self, other: BoundedFindings) -> None:
        """Append the findings of a later part of the pass."""
        # the parts come in the order of the files, so the findings that are kept do not depend on the processes
        for rule, findings in other._kept.items():
            kept = self._kept.setdefault(rule, [])
            kept += findings[: SHOWN - len(kept)]
        self._total += other._total

    def rename(self, rule: str, other: str) -> None:
        """Put the findings of a rule under another one."""
        self._kept[other] = [replace(finding, rule=other) for finding in self._kept.pop(rule, [])]
        self._total[other] = self._total.pop(rule, 0)

    def of(self, *rules: str) -> Iterator[Finding]:
        """Yield the findings of some rules; the last finding of a rule gives the number of those that are not kept."""
        for rule in rules:
            kept = self._kept.get(rule, [])
            yield from kept
            more = self._total[rule] - len(kept)
            if more:
                yield rest_of_findings(rule, more)


@dataclass
class DatasetTally:
    """The rows that were read, in columns of one value a row.

    Attributes:
        places: File and line of each row, packed into one number.
        held_out: 1 for each row that is held out, 0 for each that is trained on.
        tokens: Tokens of each row.
        supervised: Supervised tokens of each row.
        rows: A digest of each row's ids and labels.
        likenesses: A digest of each row's texts without spaces, case, punctuation and Unicode form.
        prompts: A digest of the ids before each assistant turn that is trained on.
        owners: The row of each prompt; the last prompt of a row is its own.
        counts: Numbers by file and name.
        beyond: Numbers of tokens, turns and prompts beyond `max_length`, by name.
        changed: Number of rows that the recipe's policies drop, cut, or keep without a label, by change.
        deviations: How many rows show each named deviation, and the first place of each.
        findings: The findings, rule by rule.
    """

    places: array[int] = field(default_factory=lambda: array("Q"))
    held_out: bytearray = field(default_factory=bytearray)
    tokens: array[int] = field(default_factory=lambda: array("I"))
    supervised: array[int] = field(default_factory=lambda: array("I"))
    rows: bytearray = field(default_factory=bytearray)
    likenesses: bytearray = field(default_factory=bytearray)
    prompts: bytearray = field(default_factory=bytearray)
    owners: array[int] = field(default_factory=lambda: array("I"))
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    beyond: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    deviations: dict[str, tuple[int, str]] = field(default_factory=dict)
    findings: BoundedFindings = field(default_factory=BoundedFindings)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)

    def extend(self, other: DatasetTally) -> None:
        """Append the rows, counts and findings of the next part of the pass."""
        # before the columns grow: the later part counts its rows from 0
        first = len(self)
        self.owners.extend(first + owner for owner in other.owners)
        for name in ("places", "held_out", "tokens", "supervised", "rows", "likenesses", "prompts"):
            getattr(self, name).extend(getattr(other, name))
        self.counts += other.counts
        self.beyond += other.beyond
        self.changed += other.changed
        for name, (count, place) in other.deviations.items():
            self.add_deviation(name, place, count)
        self.findings.extend(other.findings)

    def add_deviation(self, name: str, place: str, count: int = 1) -> None:
        """Count rows that show a named deviation."""
        before, first = self.deviations.get(name, (0, place))
        self.deviations[name] = (before + count, first)

    def at(self, row: int) -> tuple[int, int]:
        """Return a row's file and line."""
        return self.places[row] >> _LINE_BITS, self.places[row] & ((1 << _LINE_BITS) - 1)


def packed_place(file: int, line: int) -> int:
    """Return file and line as one number."""
    return file << _LINE_BITS | line


def digest_at(digests: bytearray, index: int) -> bytes:
    """Return one of many digests."""
    return bytes(digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])


def equal_groups(digests: bytearray, indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices that have one digest in common, for each digest that several have, in order of the first."""
    with memoryview(digests).cast("Q") as halves:
        # millions of digests are sorted as numbers, which takes little memory; only those that may be repeated are
        # put into groups
        repeated = {one for one, other in pairwise(sorted(halves[2 * index] for index in indices)) if one == other}
        groups: dict[bytes, list[int]] = {}
        for index in indices:
            if halves[2 * index] in repeated:
                groups.setdefault(digest_at(digests, index), []).append(index)
    yield from (group for group in groups.values() if len(group) > 1)


def percentile(ordered: list[int], percent: int) -> int:
    """Return the smallest of some values in order that `percent` of them do not exceed; 0 of none."""
    # the nearest rank, ceil(n * p / 100), in whole numbers: a float could round it to the next value
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0


def spread(values: array[int]) -> dict[str, Any]:
    """Return total, mean, median, 95th percentile and maximum of many values."""
    ordered = sorted(values)
    mean = round(sum(ordered) / len(ordered), 2) if ordered else 0.0
    quantiles = {name: percentile(ordered, percent) for name, percent in (("p50", 50), ("p95", 95), ("max", 100))}
    return {"total": sum(ordered), "mean": mean, **quantiles}
