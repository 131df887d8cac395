"""Known deviations: rule ids and node ids that a team has looked at and accepts, each with its reason."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Xfail:
    """One known deviation.

    Attributes:
        id: A rule id, for the findings of this rule in every check, or a node id, for all findings of this check.
        reason: The reason why it is accepted.
        place: File and line.
    """

    id: str
    reason: str
    place: str

    def covers(self, rule: str, nodeid: str) -> bool:
        """Return whether a finding of this rule in this check is this known deviation."""
        return self.id in (rule, nodeid)


def read_xfails(path: Path) -> tuple[Xfail, ...]:
    """Read a file of known deviations, one a line: `ID  # reason`.

    Blank lines and lines that begin with `#` are skipped.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If a line has no reason, an unknown rule, or an id that an earlier line has; with file and line.
    """
    from pytest_mistral_lora.conformance.finding import RULES

    xfails: dict[str, Xfail] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        # a node id may contain a #, so that only one at the start or after white space begins the reason
        name, _, reason = (part.strip() for part in re.sub(r"(^|\s)#", "\0", line, count=1).partition("\0"))
        place = f"{path}:{number}"
        if not name:
            continue
        if not reason:
            raise ValueError(f"{place}: {name!r} has no reason; expected: {name}  # why it is accepted")
        if "::" not in name and name not in RULES:
            raise ValueError(f"{place}: there is no rule {name!r}; expected a rule id such as ML204, or a node id")
        if name in xfails:
            raise ValueError(f"{place}: {name} is listed twice; it is already in {xfails[name].place}")
        xfails[name] = Xfail(name, reason, place)
    return tuple(xfails.values())
