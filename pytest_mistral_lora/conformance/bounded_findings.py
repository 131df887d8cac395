"""Findings in bounded memory: the first of each rule, and the number of all."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pytest_mistral_lora.conformance.finding import Finding, rest_of_findings

SHOWN = 20
"""Most findings to keep of one rule; more are counted."""

LONGEST = 2000
"""Most characters of a text in a finding."""
_CUT = " …"

_BEHIND_ALL = 1 << 64
"""Behind the place of each row, as `packed_place` returns it."""


class _Key(NamedTuple):
    """The findings that are kept and counted together.

    Attributes:
        rule: Their rule.
        is_raised: Whether they are errors of a rule that is a note.
    """

    rule: str
    is_raised: bool

    @classmethod
    def of(cls, finding: Finding) -> _Key:
        return cls(finding.rule, finding.is_raised)


class BoundedFindings:
    """Findings by rule: the first of each rule, in the order of the files, are kept; all are counted.

    The errors of a rule that is a note are kept beside its notes, which may be more.

    Attributes:
        at: Place of the judged row, as `packed_place` returns it.
    """

    def __init__(self) -> None:
        self.at = 0
        self._kept: dict[_Key, list[tuple[int, Finding]]] = {}
        self._total: Counter[_Key] = Counter()

    @property
    def rules(self) -> list[str]:
        """The rules that have findings."""
        return sorted({key.rule for key, count in self._total.items() if count})

    def __contains__(self, rule: str) -> bool:
        """Return whether a rule has findings."""
        return any(count for key, count in self._total.items() if key.rule == rule)

    def add(self, finding: Finding) -> None:
        """Count a finding of the judged row, and keep it if it is among the first."""
        self._add(finding, self.at)

    def add_of_file(self, finding: Finding, file: int | None) -> None:
        """Count a finding that only whole files show, and keep it if it is among the first.

        Args:
            finding: The finding. One that counts others, as `of` yields it, adds its number alone.
            file: The place of its file, as `packed_place` returns it; None if it is about rows, which come behind
                the findings of single rows in the order of these calls.
        """
        if finding.more:
            self._total[_Key.of(finding)] += finding.more
        else:
            self._add(finding, _BEHIND_ALL if file is None else file)

    def add_made(self, rule: str, make: Callable[[], Finding]) -> None:
        """Count a finding of a rule behind those before it; make it only if it would be kept."""
        key = _Key(rule, is_raised=False)
        if len(self._kept.get(key, ())) < SHOWN:
            self._add(make(), self.at)
        else:
            self._total[key] += 1

    def _add(self, finding: Finding, at: int) -> None:
        key = _Key.of(finding)
        self._total[key] += 1
        kept = self._kept.setdefault(key, [])
        if len(kept) < SHOWN or at < kept[-1][0]:
            # after those of the same row, which keeps the order of discovery
            insort(kept, (at, _with_short_texts(finding)), key=lambda entry: entry[0])
            del kept[SHOWN:]

    def extend(self, other: BoundedFindings) -> None:
        """Add the findings of other rows."""
        for key, findings in other._kept.items():
            self._keep(key, findings)
        self._total += other._total

    def _keep(self, key: _Key, findings: Sequence[tuple[int, Finding]]) -> None:
        both = [*self._kept.get(key, ()), *findings]
        self._kept[key] = sorted(both, key=lambda entry: entry[0])[:SHOWN]

    def rename(self, rule: str, other: str) -> None:
        """Move the findings of a rule to another rule."""
        for key in self._keys_of(rule):
            renamed = key._replace(rule=other)
            self._keep(renamed, [(at, finding.under(other)) for at, finding in self._kept.pop(key, [])])
            self._total[renamed] += self._total.pop(key)

    def weaken(self, rule: str) -> None:
        """Make the errors of a rule that is a note notes."""
        for key in self._keys_of(rule):
            if key.is_raised:
                weak = key._replace(is_raised=False)
                self._keep(weak, [(at, replace(finding, severity="note")) for at, finding in self._kept.pop(key, [])])
                self._total[weak] += self._total.pop(key)

    def _keys_of(self, rule: str) -> list[_Key]:
        """Return the keys of a rule: its errors first."""
        found = [key for key in self._total if key.rule == rule]
        return sorted(found, key=lambda key: not key.is_raised)

    def of(self, *rules: str) -> Iterator[Finding]:
        """Yield the findings of some rules; the last finding of a rule gives the number of dropped ones."""
        for rule in rules:
            for key in self._keys_of(rule):
                kept = self._kept.get(key, [])
                yield from (finding for _, finding in kept)
                more = self._total[key] - len(kept)
                if more:
                    rest = rest_of_findings(rule, more)
                    yield replace(rest, severity="error") if key.is_raised else rest


def _with_short_texts(finding: Finding) -> Finding:
    """Return a finding whose texts are cut, such as those of a very long row; a cut text stays as it is."""
    cut: dict[str, Any] = {}
    for name in ("found", "expected", "detail"):
        text = getattr(finding, name)
        if len(text) > LONGEST and text[LONGEST:] != _CUT:
            cut[name] = text[:LONGEST] + _CUT
    return replace(finding, **cut) if cut else finding
