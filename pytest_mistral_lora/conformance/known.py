"""Known deviations: findings that a team accepts, each with its reason, and the list to start from."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import opened
from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.errors import did_you_mean

_LONGEST = 110


@dataclass(frozen=True, slots=True)
class Xfail:
    """One known deviation.

    Attributes:
        id: A rule id, for the findings of this rule in every check; a node id, for all findings of this check; or the
            name of a cause, such as `default-system-prompt`, for the findings of this cause in every check.
        reason: The reason why it is accepted.
        place: File and line.
    """

    id: str
    reason: str
    place: str

    @property
    def unmatched(self) -> str:
        """The message for a deviation that no finding of a full run is."""
        return f"{self.place}: {self.id} matches no finding: it is fixed or misspelled; remove it"


def read_xfails(path: Path) -> tuple[Xfail, ...]:
    """Read a file of known deviations, one a line: `ID  # reason`, with the id of a rule or check, or a cause's name.

    Blank lines and lines that begin with `#` are skipped.

    Raises:
        InputError: If it is a pipe or a device.
        OSError: If the file cannot be read.
        ValueError: If it is not UTF-8, or a line has no reason, an unknown rule, or an id that an earlier line has;
            with file and line.
    """
    xfails: dict[str, Xfail] = {}
    try:
        # editors on Windows write a byte order mark
        with opened(path) as file:
            content = file.read()
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{number}: not valid UTF-8; save the file as UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        # a node id may contain a #, so that only one at the start or after white space begins the reason
        name, _, reason = (part.strip() for part in re.sub(r"(^|\s)#", "\0", line, count=1).partition("\0"))
        place = f"{path}:{number}"
        if not name:
            continue
        if not reason:
            raise ValueError(f"{place}: {name!r} has no reason; expected: {name}  # why it is accepted")
        if "::" not in name and name not in RULES and name not in _cause_names():
            hint = did_you_mean(name, _cause_names())
            expected = "a rule id such as ML204, a node id, or the name of a cause such as default-system-prompt"
            raise ValueError(f"{place}: there is no rule or cause {name!r}{hint}; expected {expected}")
        if name in xfails:
            raise ValueError(f"{place}: {name} is listed twice; it is already in {xfails[name].place}")
        xfails[name] = Xfail(name, reason, place)
    return tuple(xfails.values())


def _cause_names() -> frozenset[str]:
    """Return the names of causes that a finding can have."""
    from pytest_mistral_lora.chat.templates.faults import CAUSE_NAMES  # a list of rules alone needs none of them

    return CAUSE_NAMES


def _ids(finding: Finding, nodeid: str) -> set[str]:
    """Return the ids by which a list of known deviations accepts a finding of a check."""
    return {finding.rule, nodeid, finding.name} - {""}


def known_among(findings: Sequence[Finding], nodeid: str, xfails: Iterable[Xfail]) -> list[Xfail]:
    """Return the known deviations that a finding of this check matches."""
    return [xfail for xfail in xfails if any(xfail.id in _ids(finding, nodeid) for finding in findings)]


def unknown_among(findings: Sequence[Finding], nodeid: str, xfails: Iterable[Xfail]) -> list[Finding]:
    """Return the findings of this check that no known deviation covers."""
    known = {xfail.id for xfail in xfails}
    return [finding for finding in findings if known.isdisjoint(_ids(finding, nodeid))]


def baseline_text(records: Iterable[Mapping[str, Any]], *, strict: bool = False) -> str:
    """Return the list of known deviations that accepts a run, with empty reasons, as `read_xfails` reads it.

    A finding whose cause has a name is listed by it. A rule that one check breaks is listed by the node id of this
    check, so that it still fails in others. A rule that several checks break is listed once.

    Args:
        records: The record of each check.
        strict: Whether notes, and checks that could not run, are failures.
    """
    headlines: dict[str, list[str]] = {}
    homes: dict[tuple[str, str], dict[str, list[str]]] = {}
    for record in records:
        if strict and record["not_checked"]:
            headlines.setdefault(record["nodeid"], []).append(f"not checked: {record['not_checked']}")
        for finding in record["findings"]:
            if strict or finding["severity"] == "error":
                # a cause of its own, else all that is left of a rule
                checks = homes.setdefault((finding["rule"], finding.get("name", "")), {})
                checks.setdefault(record["nodeid"], []).append(f"{finding['place']}: {finding['found']}")
    lines = list(_HEADER)
    for (rule, cause), checks in homes.items():
        nodeid, found = next(iter(checks.items()))
        # the narrowest entry for which one reason is enough
        name = cause or (rule if len(checks) > 1 else nodeid)
        count = sum(map(len, checks.values()))
        several = f" in {len(checks)} checks" if len(checks) > 1 else ""
        counted = f" ({count} findings{several})" if count > 1 else ""
        headlines.setdefault(name, []).append(f"{rule}{counted} {found[0]}")
    for name, found in headlines.items():
        # one line each: the text of a finding may quote a row, which must not become an entry
        lines += ["", *(f"# {' '.join(one.split())}"[:_LONGEST] for one in found), f"{name}  # "]
    return "\n".join(lines) + "\n"


_HEADER = (
    "# Deviations that were found. Write behind each `#` why you accept it, or fix it and remove its line: a line",
    "# without a reason is refused, and one that matches no finding any more fails the run.",
)
