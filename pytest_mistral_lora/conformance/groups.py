"""Findings by cause: a fault that breaks many rows is reported once, by the simplest one, its row as tokens."""

from __future__ import annotations

import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.diff import TokenSide
from pytest_mistral_lora.chat.kinds.records import parse_trained
from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.errors import MistralLoraError, named_value
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.secrets import spells_secret

if TYPE_CHECKING:
    from pytest_mistral_lora.conformance.targets import Target

MOST_NAMES = 1000
"""Most names of other findings to keep for a cause; more are counted."""
MOST_CAUSES = 50
"""Most causes of one rule to keep apart; findings of more causes are counted."""
MOST_WHOLE = 5
"""Most causes to print whole in a terminal, unless the user asks for all; each other one is a line."""
FILE_WIDTH = 120
"""Longest line of a list of names in a file, which is independent of a terminal."""
_MOST_CHARACTERS = 1000
_MOST_ROWS = 50
"""Most rows of a page; a report with more causes shows the first ones."""


@dataclass
class FindingGroup:
    """The findings of one rule that one fault makes.

    Attributes:
        simplest: The finding whose row has the fewest messages and the fewest characters; an error if any is.
        check: The name of its check, or of its row.
        name: Its name in the list of the others: its check, or its place if the check has several findings.
        others: The names of the other findings, in the order in which they came.
        more: The number of findings without a name.
        explained: The number of findings of other checks that it explains, by their rules.
        fixes: The fix in each program that may have made the artifact, at the first cause of a rule.
    """

    simplest: Finding
    check: str
    name: str | Place
    others: list[str | Place] = field(default_factory=list)
    more: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    fixes: tuple[tuple[str, str], ...] = ()

    @property
    def count(self) -> int:
        """The number of findings."""
        return 1 + len(self.others) + self.more

    @property
    def total(self) -> int:
        """The number of findings, with those that the cause explains."""
        return self.count + sum(count for _, count in self.shown.covers)

    @property
    def shown(self) -> Finding:
        """The simplest finding, with the number of those that it explains, and the fixes."""
        explained = Counter(dict(self.simplest.covers)) + self.explained
        return replace(self.simplest, covers=tuple(sorted(explained.items())), fixes=self.fixes)

    def add(self, finding: Finding, check: str, name: str | Place) -> None:
        """Add a finding; the simplest stays in front."""
        other = name
        if _size(finding) < _size(self.simplest):
            other, self.simplest, self.check, self.name = self.name, finding, check, name
        if len(self.others) < MOST_NAMES:
            self.others.append(other)
        else:
            self.more += 1

    def text(self, width: int) -> str:
        """Return the simplest finding, and the names of the others in lines of at most `width` characters."""
        if self.count == 1:
            return self.shown.text()
        names = listed_names(self.others)
        unnamed = [f"{self.more} that {'are' if self.more > 1 else 'is'} only counted"] if self.more else []
        text = f"and {self.count - 1} more like it: {'; '.join([*names, *unnamed])}"
        # readers copy the whole name of a file or a check
        lines = textwrap.wrap(
            text, max(width, 60), subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
        )
        return "\n".join([self.shown.text(), *lines])

    def headline(self, width: int | None = None) -> str:
        """Return one line that begins with the rule and its finding; cut to `width`, but for its remark."""
        finding, place = self.simplest, str(self.simplest.place)
        remarks = [f"{self.total} findings"] if self.total > 1 else []
        remarks += [finding.from_version] if finding.from_version else []
        counted = f" ({'; '.join(remarks)})" if remarks else ""
        line = f"{finding.rule} {printable(named_value(finding.words, finding.place.field, RULES[finding.rule].title))}"
        width = max(width, 40) if width is not None else len(line) + len(counted) + len(place) + 3
        room = width - len(counted)
        if len(line) > room:
            # the beginning is the same for every finding of a rule; the shape identifies this one
            counted = f" {finding.shape}{counted}" if len(finding.shape) < room // 2 and finding.shape else counted
            return f"{line[: width - len(counted) - 1]}…{counted}"
        # a path is the most dispensable part, first its folders
        places = [place, place.rpartition("/")[2]] if place else []
        fitting = (f" - {shown}" for shown in places if len(line) + len(shown) + 3 <= room)
        return f"{line}{counted}{next(fitting, '')}"

    def to_json(self) -> dict[str, Any]:
        """Return the cause as plain JSON data: its key, its simplest finding, their number, the names of the others."""
        others = sorted(map(str, self.others), key=_by_number)
        extra = {"cause": self.simplest.cause, "check": self.check, "count": self.count, "others": others}
        return {**self.shown.to_json(), **extra}


class FindingGroups:
    """Findings by cause, in order of arrival; memory is bounded for files of any length."""

    def __init__(self) -> None:
        self._causes: dict[str, dict[str, FindingGroup]] = {}
        self._unnamed: Counter[str] = Counter()
        self._fixes: dict[str, tuple[tuple[str, str], ...]] = {}
        self._effects: list[tuple[Finding, str, str | Place]] = []
        self._folded: set[tuple[str, Place, str]] = set()

    def add(self, finding: Finding, check: str, name: str | Place = "") -> None:
        """Add a finding.

        Args:
            finding: The finding.
            check: The name of its check, or of its row.
            name: Its name among the findings of its cause; empty for the name of the check.
        """
        if finding.fixes:
            # the fixes in several programs are shown once for each rule, whichever finding stands for its cause
            self._fixes.setdefault(finding.rule, finding.fixes)
            finding = replace(finding, fixes=())
        if finding.effect_of:
            self._effects.append((finding, check, name))
        else:
            self._add(finding, check, name)

    def _add(self, finding: Finding, check: str, name: str | Place) -> None:
        of_rule = self._causes.setdefault(finding.rule, {})
        cause = of_rule.get(finding.cause)
        if finding.more or (cause is None and len(of_rule) >= MOST_CAUSES):
            self._unnamed[finding.rule] += finding.more or 1
        elif cause is None:
            of_rule[finding.cause] = FindingGroup(finding, check, name or check)
        else:
            cause.add(finding, check, name or check)

    def _settle(self) -> None:
        """Count each effect at its cause; without a finding of its cause, it stands for itself."""
        effects, self._effects = self._effects, []
        # those of their own rule first: if they stand for themselves, they may be the cause of others
        for is_own in (True, False):
            alone = []
            for finding, check, name in effects:
                rule = finding.effect_of.partition(" ")[0]
                if (rule == finding.rule) != is_own:
                    continue
                of_rule = self._causes.get(rule, {})
                causes = [*of_rule.values()]
                if finding.effect_of != rule:
                    causes = [cause for key, cause in of_rule.items() if key == finding.effect_of]
                if not causes:
                    alone.append((finding, check, name))
                    continue
                target = check.partition("::")[0]
                cause = next((cause for cause in causes if cause.check.partition("::")[0] == target), causes[0])
                cause.explained[finding.rule] += 1 + finding.more
                self._folded.add((finding.rule, finding.place, finding.found))
            for finding, check, name in alone:
                self._add(finding, check, name)

    def standing(self, findings: Iterable[Finding]) -> list[Finding]:
        """Return those of some findings that no other finding explains, the explaining ones in front.

        Args:
            findings: Findings that were added.
        """
        explaining = [cause.shown for cause in self if cause.shown.covers]
        hidden = {(finding.rule, finding.place, finding.found) for finding in explaining} | self._folded
        others = [finding for finding in findings if (finding.rule, finding.place, finding.found) not in hidden]
        return [*explaining, *others]

    def __iter__(self) -> Iterator[FindingGroup]:
        """Yield the causes: those that explain other findings first, then errors before notes.

        The first cause of a rule has the fixes in each program that may have made the artifact.
        """
        self._settle()
        causes = []
        for rule, of_rule in self._causes.items():
            found = list(of_rule.values())
            if self._unnamed[rule] and found:
                most = max(found, key=lambda cause: cause.count)
                most.more += self._unnamed.pop(rule)
            causes += found
        causes.sort(key=lambda cause: (not cause.shown.covers, cause.simplest.severity != "error"))
        fixes = dict(self._fixes)
        for cause in causes:
            cause.fixes = fixes.pop(cause.simplest.rule, ())
        return iter(causes)


def signs_among(causes: FindingGroups) -> list[FindingGroup]:
    """Return the causes that nothing proves."""
    return [cause for cause in causes if cause.simplest.is_sign]


def group_findings(outcomes: Iterable[CheckOutcome]) -> FindingGroups:
    """Return the findings of checks by cause.

    Args:
        outcomes: The outcome of each check.
    """
    causes = FindingGroups()
    for outcome in outcomes:
        for finding in outcome.findings:
            label: str | Place = outcome.name
            # a check of the template judges one row, whose name says more than the template's file
            if len(outcome.findings) > 1 and outcome.subject != "template":
                # its name among the findings of its check: its line, or else its tensor
                first = finding.found.partition(" ")[0]
                label = first if "." in first and finding.place.record is None else finding.place
            causes.add(finding, outcome.name, label)
    return causes


def cause_texts(findings: Iterable[Finding]) -> list[str]:
    """Return a text for each cause of a check's findings."""
    groups = FindingGroups()
    for finding in findings:
        groups.add(finding, "", finding.place)
    return [cause.text(FILE_WIDTH) for cause in groups]


def listed_names(names: Iterable[str | Place]) -> list[str]:
    """Return a short list of names: grouped by subject or file, numbers of rows as ranges, and not all."""
    homes: dict[str, set[str]] = {}
    for name in names:
        if isinstance(name, Place) and name.record is not None and not name.source.is_value:
            home, last = f"{name.source.name}{':' if name.line is None else ' record '}", str(name.record)
        else:
            subject, _, last = ("", "", str(name)) if isinstance(name, Place) else name.rpartition("::")
            home = f"{subject}: " if subject else ""
        homes.setdefault(home, set()).add(last)
    lists, room, hidden = [], _MOST_CHARACTERS, 0
    for home, cases in homes.items():
        pieces = [(name, 1) for name in sorted(cases, key=_by_number)]
        if all(case.isdecimal() for case in cases):
            # runs of numbers, each with its length
            runs: list[list[int]] = []
            for number in sorted(map(int, cases)):
                if runs and number == runs[-1][-1] + 1:
                    runs[-1].append(number)
                else:
                    runs.append([number])
            pieces = [(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}", len(run)) for run in runs]
        shown = []
        for piece, count in pieces:
            hidden += 0 if room > 0 else count
            shown += [piece] if room > 0 else []
            room -= len(piece) + 2
        lists += [f"{home}{', '.join(shown)}"] if shown else []
    return lists + ([f"… and {hidden} more"] if hidden else [])


def _by_number(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts names with their numbers as numbers: `row 9` before `row 10`."""
    parts = re.split(r"([0-9]+)", name)
    # by its length and then its digits, a number may have any number of them
    numbers = (part.lstrip("0") for part in parts[1::2])
    keys = [(0, part) for part in parts]
    keys[1::2] = [(1 + len(number), number) for number in numbers]
    return keys


def _size(finding: Finding) -> tuple[int, int, int, int]:
    # other characters than ASCII are harder to read in a table of tokens: count their escapes
    length = len(finding.row.encode("unicode_escape")) or len(finding.found)
    # an error fails the check: a note of the same cause must not stand for it, nor one of newer rules for a note
    is_weak = finding.severity != "error"
    return is_weak, finding.row.count('"role"'), length, len(finding.detail)


def failed_rows(causes: Iterable[FindingGroup], targets: Sequence[Target]) -> list[TokenRow]:
    """Return the row of each cause with a row: mistral-common's encoding for the check's target, and the judged one.

    A row that mistral-common refuses has no tokens, and is left out; so is a row that spells a secret.

    Args:
        causes: The findings by cause.
        targets: The targets of the run; a check's name begins with that of its target.
    """
    # findings cross processes, so the name of the check is all that they keep of the target
    homes = {target.name: target for target in targets}
    rows: list[TokenRow] = []
    shown = 0
    for cause in causes:
        target, finding = homes.get(cause.check.partition("::")[0]), cause.simplest
        if not finding.row or target is None or shown == _MOST_ROWS:
            continue
        try:
            oracle = target.oracle
            row = parse_trained(json.loads(finding.row)).with_objective(target.objective_at(finding.place))
            encoded = oracle.encode(row)
        except (MistralLoraError, ValueError):
            # the finding explains why; there are no tokens to show
            continue
        title = f"{finding.rule} {finding.place or cause.check}"
        side = TokenSide.of("mistral-common", encoded, oracle.piece)
        whole = TokenRow.single(title, side)
        parts = [whole] if finding.tokens is None else finding.tokens.with_surroundings(title, side)
        # a secret may lie across two parts
        if not any(map(spells_secret, (whole, *parts))):
            rows += parts
            shown += 1
    return rows
