"""The result of a pass over a dataset or a part of it: columns of a few bytes a row, counts, and the first findings.

Results of parts merge in any order: `DatasetTally.ordered` puts the rows into the order of the files.
"""

from __future__ import annotations

from array import array
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, count, pairwise, takewhile
from typing import Any, ClassVar, NamedTuple

from pytest_mistral_lora.conformance.finding import Finding, rest_of_findings
from pytest_mistral_lora.conformance.row_pass import ObserverStates
from pytest_mistral_lora.places import NOWHERE, Place

SHOWN = 20
"""Most findings to keep of one rule; more are counted."""

LONGEST = 2000
"""Most characters of a text in a finding."""

# 128 bits: among a billion rows, two different ones share a digest with a chance of about 1 in 10**21
DIGEST_BYTES = 16
SKETCH_BYTES = 64
# a file of 2**40 rows would have tens of terabytes, and 24 bits are left for the number of the file
LINE_BITS = 40


DECIDED_BY_FILE = frozenset({"ML624", "ML626", "ML628", "ML630"})
"""Rules on rows whose severity the whole file decides."""


class BoundedFindings:
    """Findings by rule: the first of each rule, in the order of the files, are kept; all are counted.

    The errors of a rule that is a note are kept beside its notes, which may be more.

    Attributes:
        at: Place of the judged row, as `packed_place` returns it.
        caught: The findings of the judged row that no other row decides, if a pass reports them by row; else None.
    """

    def __init__(self) -> None:
        self.at = 0
        self.caught: list[Finding] | None = None
        self._kept: dict[tuple[str, bool], list[tuple[int, Finding]]] = {}
        self._total: Counter[tuple[str, bool]] = Counter()

    @property
    def rules(self) -> list[str]:
        """The rules that have findings."""
        return sorted({rule for (rule, _), count in self._total.items() if count})

    def __contains__(self, rule: str) -> bool:
        """Return whether a rule has findings."""
        return bool(self._total[rule, False] + self._total[rule, True])

    def add(self, finding: Finding) -> None:
        """Count a finding, and keep it if it is among the first; a text of a very long row is cut."""
        if self.caught is not None and finding.rule not in DECIDED_BY_FILE:
            self.caught.append(finding)
            return
        key = finding.rule, finding.is_raised
        self._total[key] += 1
        kept = self._kept.setdefault(key, [])
        if len(kept) < SHOWN or self.at < kept[-1][0]:
            texts = {name: getattr(finding, name) for name in ("found", "expected", "detail")}
            cut: dict[str, Any] = {name: f"{text[:LONGEST]} …" for name, text in texts.items() if len(text) > LONGEST}
            # after those of the same row, which keeps the order of discovery
            insort(kept, (self.at, replace(finding, **cut)), key=lambda entry: entry[0])
            del kept[SHOWN:]

    def add_made(self, rule: str, make: Callable[[], Finding]) -> None:
        """Count a finding of a rule; make it only if the next finding would be kept at any place."""
        if len(self._kept.get((rule, False), ())) < SHOWN:
            self.add(make())
        else:
            self._total[rule, False] += 1

    def extend(self, other: BoundedFindings) -> None:
        """Add the findings of other rows."""
        for key, findings in other._kept.items():
            self._keep(key, findings)
        self._total += other._total

    def _keep(self, key: tuple[str, bool], findings: Sequence[tuple[int, Finding]]) -> None:
        both = [*self._kept.get(key, ()), *findings]
        self._kept[key] = sorted(both, key=lambda entry: entry[0])[:SHOWN]

    def rename(self, rule: str, other: str) -> None:
        """Move the findings of a rule to another rule."""
        for is_raised in (False, True):
            found = self._kept.pop((rule, is_raised), [])
            self._keep((other, is_raised), [(at, finding.under(other)) for at, finding in found])
            self._total[other, is_raised] += self._total.pop((rule, is_raised), 0)

    def weaken(self, rule: str) -> None:
        """Make the errors of a rule that is a note notes."""
        found = self._kept.pop((rule, True), [])
        self._keep((rule, False), [(at, replace(finding, severity="note")) for at, finding in found])
        self._total[rule, False] += self._total.pop((rule, True), 0)

    def of(self, *rules: str) -> Iterator[Finding]:
        """Yield the findings of some rules; the last finding of a rule gives the number of dropped ones."""
        for rule in rules:
            for is_raised in (True, False):
                kept = self._kept.get((rule, is_raised), [])
                yield from (finding for _, finding in kept)
                more = self._total[rule, is_raised] - len(kept)
                if more:
                    rest = rest_of_findings(rule, more)
                    yield replace(rest, severity="error") if is_raised else rest


class SignExample(NamedTuple):
    """A row that shows a sign.

    Attributes:
        at: Its place as `packed_place` returns it.
        shown: The text that shows it; may be empty.
        place: Its place.
    """

    at: int
    shown: str
    place: Place


@dataclass
class SignCount:
    """Rows that show a sign.

    Attributes:
        rows: Their number.
        examples: The first of them.
    """

    MOST: ClassVar = 3
    """Most examples to keep."""

    rows: int = 0
    examples: list[SignExample] = field(default_factory=list)

    def add(self, at: int, shown: str, place: Place) -> None:
        """Add a row that comes after the others."""
        self.rows += 1
        if len(self.examples) < self.MOST:
            self.examples.append(SignExample(at, shown, place))

    def extend(self, other: SignCount) -> None:
        """Add other rows, which may come before or after these."""
        self.rows += other.rows
        self.examples = sorted([*self.examples, *other.examples], key=lambda example: example[:2])[: self.MOST]


@dataclass
class DatasetTally:
    """The rows that were read, in columns of one value a row.

    Attributes:
        place: The place of the row that is judged.
        places: File and record of each row, packed into one number.
        lines: The line where each row begins, if its records are not lines; else 0.
        held_out: 1 for each row that is held out, 0 for each that is trained on.
        rows: A digest of each row's ids and labels.
        likenesses: A digest of each row's texts without spaces, case, punctuation and Unicode form.
        sketches: A sketch of each row for finding near rows, of `SKETCH_BYTES`; empty without sketches.
        prompts: A digest of the ids before each assistant turn that is trained on.
        owners: The row of each prompt; the last prompt of a row identifies it.
        answers: A checksum of each row's last answer, whose last bit says whether it is long; 0 without an answer.
        tokens: Number of rows by their tokens.
        supervised: Number of rows by their supervised tokens.
        lengths: Number of rows by their tokens before the recipe's policies, including refused and dropped rows.
        longest: Tokens of the longest of these rows, and its negative place; the first row, if several are as long.
        counts: Numbers by file and name.
        named: Numbers by kind and name: of messages by role, of calls by tool, of rows by script.
        beyond: Numbers of tokens, turns and prompts beyond `max_length`, by name.
        changed: Number of rows that the recipe's policies drop, cut, or keep without a label, by change.
        deviations: For each named deviation, the number of rows that show it, and the first of them: its place as a
            number and as a value.
        signs: Rows by file and by the name of a sign that they show.
        system_prompts: The least and the greatest checksum of the system prompts of each file.
        answer_lengths: For each file and unit, the number of last answers by length.
        sided: The row of each record with sides.
        opposites: A digest of the record that says the opposite of each of these.
        answer_tokens: For each file and side, the number of answers by their tokens.
        alike: Number of pairs by the tokens that both sides begin with.
        open_answers: For each file and unit, those that end in the middle of a sentence, by length.
        findings: The findings, rule by rule.
        states: The states of further observers.
    """

    place: Place = NOWHERE
    places: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] = field(default_factory=lambda: array("I"))
    held_out: bytearray = field(default_factory=bytearray)
    rows: bytearray = field(default_factory=bytearray)
    likenesses: bytearray = field(default_factory=bytearray)
    sketches: bytearray = field(default_factory=bytearray)
    prompts: bytearray = field(default_factory=bytearray)
    owners: array[int] = field(default_factory=lambda: array("I"))
    answers: array[int] = field(default_factory=lambda: array("I"))
    tokens: Counter[int] = field(default_factory=Counter)
    supervised: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    longest: tuple[int, int] = (0, 0)
    counts: Counter[tuple[int, str]] = field(default_factory=Counter)
    named: Counter[tuple[str, str]] = field(default_factory=Counter)
    beyond: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    deviations: dict[str, tuple[int, int, Place]] = field(default_factory=dict)
    signs: dict[tuple[int, str], SignCount] = field(default_factory=dict)
    system_prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    answer_lengths: dict[tuple[int, str], Counter[int]] = field(default_factory=dict)
    open_answers: dict[tuple[int, str], dict[int, SignCount]] = field(default_factory=dict)
    sided: array[int] = field(default_factory=lambda: array("I"))
    opposites: bytearray = field(default_factory=bytearray)
    answer_tokens: dict[tuple[int, str], Counter[int]] = field(default_factory=dict)
    alike: Counter[int] = field(default_factory=Counter)
    findings: BoundedFindings = field(default_factory=BoundedFindings)
    states: ObserverStates = field(default_factory=ObserverStates)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)

    def look_at(self, file: int, place: Place) -> None:
        """Take the record to which the next findings and signs belong.

        Args:
            file: The index of its file.
            place: The place of the record.
        """
        self.findings.at, self.place = packed_place(file, place.record or 0), place

    def extend(self, other: DatasetTally) -> None:
        """Add the rows, counts and findings of another part of the dataset."""
        # before the columns grow: the other part counts its rows from 0
        first = len(self)
        self.owners.extend(first + owner for owner in other.owners)
        self.sided.extend(first + row for row in other.sided)
        for name in (
            "places",
            "lines",
            "held_out",
            "rows",
            "likenesses",
            "sketches",
            "prompts",
            "answers",
            "opposites",
        ):
            getattr(self, name).extend(getattr(other, name))
        for name in ("tokens", "supervised", "lengths", "counts", "named", "alike"):
            getattr(self, name).update(getattr(other, name))
        # drop names with a count of 0, which a report would show
        self.beyond += other.beyond
        self.changed += other.changed
        self.longest = max(self.longest, other.longest)
        for deviation, (shown, at, place) in other.deviations.items():
            self.add_deviation(deviation, place, at, shown)
        self._extend_signs(other)
        self.findings.extend(other.findings)
        self.states.extend(other.states)

    def _extend_signs(self, other: DatasetTally) -> None:
        for sign, evidence in other.signs.items():
            self.signs.setdefault(sign, SignCount()).extend(evidence)
        for file, (least, most) in other.system_prompts.items():
            known = self.system_prompts.get(file, (least, most))
            self.system_prompts[file] = (min(known[0], least), max(known[1], most))
        for unit, lengths in other.answer_lengths.items():
            self.answer_lengths.setdefault(unit, Counter()).update(lengths)
        for side, tokens in other.answer_tokens.items():
            self.answer_tokens.setdefault(side, Counter()).update(tokens)
        for unit, within in other.open_answers.items():
            known_within = self.open_answers.setdefault(unit, {})
            for length, evidence in within.items():
                known_within.setdefault(length, SignCount()).extend(evidence)

    def add_deviation(self, name: str, place: Place, at: int, count: int = 1) -> None:
        """Count a named deviation of a row, with its place as a value and as a number."""
        before, first_at, first_place = self.deviations.get(name, (0, at, place))
        first = (first_at, first_place) if first_at <= at else (at, place)
        self.deviations[name] = (before + count, *first)

    def ordered(self) -> DatasetTally:
        """Return this result with its rows in the order of the files, regardless of the order of adding parts."""
        if all(place <= other for place, other in pairwise(self.places)):
            return self
        import numpy as np

        order = np.argsort(np.frombuffer(self.places, np.uint64))
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        owners = rank[np.frombuffer(self.owners, np.uint32)].astype(np.uint32)
        # stable: the prompts of a row stay in its order
        prompts = np.argsort(owners, kind="stable")
        sided = rank[np.frombuffer(self.sided, np.uint32)].astype(np.uint32) if self.sided else np.zeros(0, np.uint32)
        records = np.argsort(sided)

        def taken(column: bytearray, size: int, places: Any) -> bytearray:
            return bytearray(np.frombuffer(column, np.uint8).reshape(-1, size)[places].data)

        return replace(
            self,
            places=array("Q", np.frombuffer(self.places, np.uint64)[order].tobytes()),
            lines=array("I", np.frombuffer(self.lines, np.uint32)[order].tobytes()),
            held_out=taken(self.held_out, 1, order),
            owners=array("I", owners[prompts].tobytes()),
            prompts=taken(self.prompts, DIGEST_BYTES, prompts),
            sided=array("I", sided[records].tobytes()),
            opposites=taken(self.opposites, DIGEST_BYTES, records) if self.opposites else bytearray(),
            rows=taken(self.rows, DIGEST_BYTES, order),
            answers=array("I", np.frombuffer(self.answers, np.uint32)[order].tobytes()),
            likenesses=taken(self.likenesses, DIGEST_BYTES, order),
            sketches=taken(self.sketches, SKETCH_BYTES, order) if self.sketches else bytearray(),
        )


def packed_place(file: int, line: int) -> int:
    """Return file and record as one number, which orders rows as the files have them."""
    return file << LINE_BITS | line


def unpacked_place(place: int) -> tuple[int, int]:
    """Return the file and record of a number that `packed_place` made."""
    return place >> LINE_BITS, place & ((1 << LINE_BITS) - 1)


def digest_at(digests: bytearray, index: int) -> bytes:
    """Return one of many digests."""
    return bytes(digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])


def equal_groups(digests: bytearray, indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of each digest that several rows share, in order of the first."""
    with memoryview(digests).cast("Q") as halves:
        # millions of digests are sorted as numbers, which takes little memory; only those that may be repeated are
        # put into groups
        repeated = {half for half, other in pairwise(sorted(halves[2 * index] for index in indices)) if half == other}
        groups: dict[bytes, list[int]] = {}
        for index in indices:
            if halves[2 * index] in repeated:
                groups.setdefault(digest_at(digests, index), []).append(index)
    yield from (group for group in groups.values() if len(group) > 1)


def percentile(counts: Mapping[int, int], percent: int) -> int:
    """Return the smallest of counted values that `percent` of them do not exceed; 0 for no values."""
    # the nearest rank, ceil(n * p / 100), in whole numbers: a float could round up to the next value
    rank = -(-sum(counts.values()) * percent // 100)
    below = accumulate(number for _, number in sorted(counts.items()))
    return next((value for value, seen in zip(sorted(counts), below, strict=True) if seen >= rank), 0)


def spread(counts: Mapping[int, int]) -> dict[str, Any]:
    """Return total, mean, median, 95th percentile and maximum of counted values, all exact."""
    total, number = sum(value * count for value, count in counts.items()), sum(counts.values())
    quantiles = {name: percentile(counts, percent) for name, percent in (("p50", 50), ("p95", 95), ("max", 100))}
    return {"total": total, "mean": round(total / number, 2) if number else 0.0, **quantiles}


_BINS = 16
_LEAST_CUT = 512


def histogram(lengths: Mapping[int, int]) -> list[dict[str, int]]:
    """Return the number of rows of each range of lengths, `from` and `to` included, both in tokens.

    The ranges are 1, 2 or 5 times a power of ten wide; the last one includes the longest hundredth of the rows.
    """
    if not lengths:
        return []
    most, longest = percentile(lengths, 99), max(lengths)
    width = next(size for power in count() for size in (10**power, 2 * 10**power, 5 * 10**power) if most < size * _BINS)
    bins: Counter[int] = Counter()
    for length, rows in lengths.items():
        bins[min(length, most) // width] += rows
    last = max(bins)
    return [
        {"from": index * width, "to": longest if index == last else (index + 1) * width - 1, "rows": bins[index]}
        for index in range(min(bins), last + 1)
    ]


def cuts(lengths: Mapping[int, int], max_length: int) -> list[dict[str, int]]:
    """Return the rows and tokens that a cut at `max_length` would touch and remove, and at each power of two.

    The powers are those from 512 to the first that cuts nothing.
    """
    longest = max(lengths, default=0)
    powers = takewhile(lambda power: power == _LEAST_CUT or power < 2 * longest, (_LEAST_CUT << n for n in count()))
    # a pass without a recipe has a length that no row reaches
    at = sorted({*powers, *([max_length] if max_length <= 2 * max(longest, _LEAST_CUT) else [])})
    return [
        {
            "max_length": most,
            "rows": sum(rows for length, rows in lengths.items() if length > most),
            "tokens": sum((length - most) * rows for length, rows in lengths.items() if length > most),
        }
        for most in at
    ]
