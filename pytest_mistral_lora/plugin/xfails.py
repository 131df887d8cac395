"""Known deviations: rule ids and node ids that a team has looked at and accepts, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Xfail:
    """One known deviation.

    Attributes:
        id: A rule id, which stands for its findings everywhere, or a node id, for all findings of that check.
        reason: Why it is accepted.
        place: File and line.
    """

    id: str
    reason: str
    place: str

    def covers(self, rule: str, nodeid: str) -> bool:
        """Say whether a finding of this rule in this check is the known one."""
        return self.id in (rule, nodeid)


def read(path: Path) -> tuple[Xfail, ...]:
    """Read a file of known deviations: `ID  # reason` a line; blank lines and lines that start with `#` are comments.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line has no reason, names no rule, or names an id again; it names file and line.
    """
    found: dict[str, Xfail] = {}
    for xfail in _lines(path):
        if xfail.id in found:
            raise ValueError(f"{xfail.place}: {xfail.id} again; it is already in {found[xfail.id].place}")
        found[xfail.id] = xfail
    return tuple(found.values())


def _lines(path: Path) -> Iterator[Xfail]:
    from pytest_mistral_lora.conformance.finding import RULES

    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        place = f"{path}:{number}"
        known, reason = _split(line)
        if not known:
            continue
        if not reason:
            raise ValueError(f"{place}: {known!r} has no reason; expected: {known}  # why it is accepted")
        if "::" not in known and known not in RULES:
            raise ValueError(f"{place}: {known!r} is no rule; expected a rule id such as ML204, or a node id")
        yield Xfail(known, reason, place)


def _split(line: str) -> tuple[str, str]:
    """Split a line at the first `#` that stands at its start or after white space: a node id may hold others."""
    known, _, reason = re.sub(r"(^|\s)#", "\0", line, count=1).partition("\0")
    return known.strip(), reason.strip()
