"""The result of a program on the packaged cases: one shape for trainers, for servers and for parsers of answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

DEVIATION = "as "
"""Begins the label of a named deviation; every other label is the id of a rule."""


@dataclass(frozen=True)
class Example:
    """A case that shows a difference.

    Attributes:
        case: The name of the case or of a part of it, as in the verdicts.
        found: What the program made of it.
        expected: What it should have made; may be empty.
    """

    case: str
    found: str
    expected: str

    @property
    def record(self) -> str:
        """The name of the packaged row, pair or answer."""
        return record_of(self.case)


def record_of(case: str) -> str:
    """Return the name of the case that a verdict is on, or on a part of."""
    return case.partition(", ")[0]


@dataclass(frozen=True)
class Result:
    """The verdict on what a program made of the packaged rows, pairs or answers, with one setting and tokenizer.

    Attributes:
        program: The program.
        version: Its version; may be empty.
        task: Its command for preferences; else empty.
        setting: What is set in it, in Markdown.
        name: A name of program and setting, for the head of a column or line.
        tokenizer: The name of the tokenizer.
        verdicts: The labels of each case by its name: the rules that it breaks, and the named deviations that it shows;
            none if it is exactly right. A case of several parts has a verdict on each part, `NAME, PART`: on a side of
            a pair, or on a way to ask for an answer. `NAME` has then what it breaks as a whole, such as a dropped row.
        refused: Why the program made nothing of any case; empty if it made something.
        date: The day of the recording, as in 2026-11-27 (UTC); may be empty.
        environment: Version by distribution.
        examples: A case that shows a difference, by rule or by case.
        uncounted: Cases that count in no share, as no program can make them right.
        compares_lengths: Whether the program hides its ids, so that only their number is compared.
        is_contrast: Whether the setting was recorded to show what goes wrong with it: nobody should set it.
    """

    program: str
    version: str
    task: str
    setting: str
    name: str
    tokenizer: str
    verdicts: Mapping[str, Sequence[str]]
    refused: str = ""
    date: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, Example] = field(default_factory=dict)
    uncounted: Collection[str] = ()
    compares_lengths: bool = False
    is_contrast: bool = False

    @cached_property
    def by_record(self) -> dict[str, list[str]]:
        """The labels of each case, whichever of its parts has them, by its name."""
        found: dict[str, list[str]] = {}
        for name, labels in self.verdicts.items():
            known = found.setdefault(record_of(name), [])
            known += [label for label in labels if label not in known]
        return found

    @cached_property
    def counted(self) -> dict[str, list[str]]:
        """The labels of each case that counts, by its name."""
        return {name: labels for name, labels in self.by_record.items() if name not in self.uncounted}

    @property
    def right(self) -> int:
        """How many of the cases that count are exactly right."""
        return sum(not labels for labels in self.counted.values())

    @property
    def share(self) -> float:
        """The share of cases that are exactly right, from 0 to 1; 0 if the program refuses the tokenizer."""
        return self.right / len(self.counted) if self.counted else 0.0

    @property
    def labels(self) -> Counter[str]:
        """How many of the cases that count have each label."""
        return Counter(label for labels in self.counted.values() for label in labels)

    def parts(self, case: str) -> dict[str, Sequence[str]]:
        """Return the labels of the parts of a case, by their names; empty for a case without parts."""
        start = f"{case}, "
        return {name.removeprefix(start): labels for name, labels in self.verdicts.items() if name.startswith(start)}
