"""Known deviations: findings that a team accepts, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.reading import opened
from pytest_mistral_lora.conformance.checks import ROOT, SUBJECTS
from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.errors import InputError, RecipeError, did_you_mean
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import NOWHERE

if TYPE_CHECKING:
    from pytest_mistral_lora.programs.facts import Standing
    from pytest_mistral_lora.training.recipe import Recipe

# the date is the last part of a line, and has a # of its own
_UNTIL = re.compile(r"(?:^|\s)#\s*(?P<end>until\b(?P<date>.*))$", re.IGNORECASE)
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_EXACT = "# until 2027-06-30"
"""The one form of a date, which is the last part of a line."""

_YEAR = r"20[2-9]\d"
_MONTH = r"(?:jan|feb|mar|apr|may|june?|july?|aug|sept?|oct|nov|dec)[a-z]*\.?"
_DAY = r"\d{1,2}(?:st|nd|rd|th)?\.?"
_WHOLE = (
    rf"(?:{_YEAR}[-/.]\d{{1,2}}[-/.]\d{{1,2}}|\d{{1,2}}[-/.]\d{{1,2}}[-/.]{_YEAR}"
    rf"|{_DAY}[\s-](?:of\s)?{_MONTH},?[\s-]{_YEAR}|{_MONTH}\s{_DAY},?\s{_YEAR})"
)
_PART = (
    rf"(?:{_YEAR}\d{{4}}|{_YEAR}(?=$|[.,;)])|{_YEAR}[-wq]+\d{{1,2}}|\d{{1,2}}[-/.]\d{{1,2}}(?:[-/.]\d{{2}})?|q[1-4]\b(?:[\s/]{_YEAR})?"
    rf"|{_DAY}\s(?:of\s)?{_MONTH}|{_MONTH}\s{_DAY}|{_MONTH}\s{_YEAR}|{_MONTH}(?=$|[.,;)]))"
)
_END = r"(?![\w/@-]|\.\w)"
# a date within an address or the name of a file is not a date of the reason
_DATED = re.compile(rf"(?<![\w/.@-]){_WHOLE}(?:t[\d:.]+z?)?{_END}", re.IGNORECASE)
_ENDED = re.compile(
    rf"\b(?:until|till?|expir(?:es|y|ing|ation))\b[\s:=-]+(?:(?:on|at|in|date|the|end|of)\b[\s:=]+)*(?:{_WHOLE}|{_PART}){_END}",
    re.IGNORECASE,
)
# the past day on which a fault was seen says nothing of an end
_SEEN = re.compile(
    r"\b(?:since|from|on|of|in|at|seen|found|reported|filed|opened|released|published)[\s:]+$", re.IGNORECASE
)
_VERSION = re.compile(r"\bversions?[\s:]+$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Xfail:
    """One known deviation.

    Attributes:
        id: A rule id, for the findings of this rule in every check; a name within a rule, such as `ML107.encoding`; a
            node id, for all findings of this check; the name of a cause, such as `default-system-prompt`, for the
            findings of this cause in every check; or the id of a known fault, for the findings that it can explain
            under the versions of the run.
        reason: Why it is accepted.
        place: File and line.
        until: The first day on which it is no longer accepted; None for no end.
        is_of_fault: Whether its id is that of a known fault: see `field.facts`.
    """

    id: str
    reason: str
    place: str
    until: date | None = None
    is_of_fault: bool = False

    @property
    def is_over(self) -> bool:
        """Whether its last day has passed."""
        return self.until is not None and date.today() >= self.until

    @property
    def is_of_one_check(self) -> bool:
        """Whether its id is a node id."""
        return "::" in self.id

    @property
    def unmatched(self) -> str:
        """The message if every check that can find it ran, and none found it."""
        return f"{self.place}: {self.id} matches no finding: it is fixed or misspelled; remove it"

    @property
    def not_met(self) -> str:
        """The message if it has no finding, and a check that can find it did not run."""
        return f"not met: {self.id} ({self.place}): a check that can find it did not run"


@dataclass(frozen=True, slots=True)
class Finders:
    """The checks that can find a known deviation.

    Attributes:
        homes: The subjects of the deviation. If none of their checks could judge, no check could find it.
        others: Other subjects that report it beside their own rules.
        cases: The checks of the homes that report it; `*` if each can.
    """

    homes: frozenset[str]
    others: frozenset[str] = frozenset()
    cases: frozenset[str] = frozenset("*")

    def are_at_home_in(self, subject: str, case: str) -> bool:
        """Return whether a check belongs to the deviation's own subjects."""
        # the checks of a runner have the names of rows
        return subject in self.homes and (subject == "runner" or not self.cases.isdisjoint((case, "*")))

    def have(self, subject: str, case: str) -> bool:
        """Return whether a check can find the deviation."""
        return subject in self.others or self.are_at_home_in(subject, case)


_OF_ENCODED_ROWS = frozenset({"encoded", "runner"})
"""Subjects of encoded rows: those of a runner are judged by the same rules."""

_ALSO_FOUND_BY = {
    "dataset": _OF_ENCODED_ROWS,
    "mask": ("dataset",),
    "tokenizer": ("template",),
    "adapter": ("merged", "train"),
    "merged": ("adapter",),
    "manifest": ("train",),
}
"""Subjects of checks that report rules of another subject, by the subject of the rules."""

_OF_CAUSES = Finders(frozenset({"template"}), frozenset({"tokenizer", "mask", "dataset", "gguf"}))
"""The subjects that name causes: each compares the chat template with mistral-common."""


NAMED_BY_RECORDS = ("manifest", "transcript")
"""Subjects whose checks have other names in `verify` and `smoke`, those of recorded values and transcripts.

An unknown name of theirs is not misspelled: a list may serve several verbs."""


def finders_of(xfail: Xfail) -> Finders:
    """Return the checks that can find a deviation listed by a rule or a cause."""
    if xfail.is_of_fault:
        from pytest_mistral_lora.programs.facts import fact

        fault = fact(xfail.id)
        rules = [RULES[rule.partition(".")[0]] for rule in fault.rules]
        subjects = {rule.subject for rule in rules} | ({"answer"} if fault.checks else set())
        return Finders(
            frozenset(subjects), cases=frozenset([*fault.checks, *(case for rule in rules for case in rule.cases)])
        )
    rule_id = xfail.id.partition(".")[0]
    if rule_id not in RULES:
        return _OF_CAUSES
    rule = RULES[rule_id]
    homes = _OF_ENCODED_ROWS if rule.subject == "encoded" else frozenset({rule.subject})
    return Finders(homes, frozenset(_ALSO_FOUND_BY.get(rule.subject, ())), frozenset(rule.cases))


def read_xfails(path: Path) -> tuple[Xfail, ...]:
    """Read a file of known deviations, one a line: `ID  # reason`, or `ID  # reason  # until 2027-06-30`.

    The id is a rule's, a name within a rule, a check's or a known fault's, or the name of a cause. From the date on,
    the deviation is no longer accepted. Blank lines and lines that begin with `#` are skipped.

    Raises:
        InputError: If the path is a pipe or a device.
        OSError: If the file cannot be read.
        ValueError: If it is not UTF-8, or a line has no reason, an unknown rule or subject, an id that an earlier line
            has, or an invalid date; with file and line.
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
        # a node id may contain a #, so only a # at the start or after white space begins the reason
        name, _, reason = (part.strip() for part in re.sub(r"(^|\s)#", "\0", line, count=1).partition("\0"))
        place = f"{path}:{number}"
        if not name:
            continue
        reason, until = _reason_and_date(reason, place)
        if not reason:
            raise ValueError(f"{place}: {name!r} has no reason; expected: {name}  # why it is accepted")
        if "::" in name and not _is_node_id(name):
            subject = name.split("::")[2] if name.count("::") > 1 else ""
            expected = f"{ROOT}::TARGET::SUBJECT::CHECK, as the summary prints it"
            raise ValueError(
                f"{place}: {name!r} is not the node id of a check{did_you_mean(subject, SUBJECTS)}; expected {expected}"
            )
        is_of_rule = name in RULES or RULES.has_name(name)
        is_of_fault = "::" not in name and not is_of_rule and name not in _cause_names()
        if is_of_fault:
            _require_fault(name, place)
        if name in xfails:
            raise ValueError(f"{place}: {name} is listed twice; it is already in {xfails[name].place}")
        xfails[name] = Xfail(name, reason, place, until, is_of_fault)
    return tuple(xfails.values())


def known_deviations(file: Path | None, option: str) -> tuple[Xfail, ...]:
    """Return the known deviations of a file; none without a file.

    Args:
        file: The file, or None.
        option: The option that names it, for errors.

    Raises:
        InputError: If it cannot be read, or a line is invalid.
    """
    if file is None:
        return ()
    try:
        return read_xfails(file)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}", place=option) from error
    except ValueError as error:
        raise InputError(str(error), place=option) from error


def recipe_deviations(recipe: Recipe) -> tuple[Xfail, ...]:
    """Return the known deviations of the list that a recipe names; none without a list.

    Raises:
        RecipeError: If it cannot be read, or a line is invalid.
    """
    try:
        return known_deviations(recipe.xfails, "xfails")
    except InputError as error:
        raise RecipeError(error.found, place=NOWHERE / "xfails") from error


def _require_fault(name: str, place: str) -> None:
    """Require that a name is the id of a known fault that can explain a finding.

    Raises:
        ValueError: If it is not.
    """
    from pytest_mistral_lora.programs.facts import facts

    known = {fault.id: fault for fault in facts()}
    if name not in known:
        if new_name := RULES.new_name(name):
            raise ValueError(f"{place}: {name} is no rule of its own any more; expected {new_name}")
        hint = did_you_mean(name, _cause_names() | known.keys())
        expected = (
            "a rule id such as ML204, a node id, the name of a cause such as default-system-prompt, or the id of a "
            "known fault such as merges-by-id"
        )
        raise ValueError(f"{place}: there is no rule, cause or known fault {name!r}{hint}; expected {expected}")
    if not known[name].can_explain:
        expected = "the rule or the check whose finding you accept"
        raise ValueError(f"{place}: the known fault {name!r} explains the finding of no rule; expected {expected}")


def _is_node_id(text: str) -> bool:
    parts = text.split("::", 3)
    return len(parts) == 4 and parts[0] == ROOT and parts[2] in SUBJECTS


def _reason_and_date(text: str, place: str) -> tuple[str, date | None]:
    """Return the two parts of the text behind an id: `reason  # until 2027-06-30`; None without a date.

    Raises:
        ValueError: If a date is invalid, or written in any other form: it would be a reason without an end.
    """
    if re.fullmatch(rf"until\s+{_DATE.pattern}", text):  # a date instead of the reason
        return "", None
    found = _UNTIL.search(text)
    if found is None:
        _refuse_dates(text, place)
        return text, None
    reason = text[: found.start()].strip()
    _refuse_dates(reason, place)
    written = found["date"].strip()
    try:
        until = date.fromisoformat(written) if _DATE.fullmatch(written) and found["end"].startswith("until") else None
    except ValueError:
        until = None
    if until is None:
        raise ValueError(f"{place}: {found['end']!r} is not a date; expected for example: {_EXACT.removeprefix('# ')}")
    return reason, until


def _refuse_dates(reason: str, place: str) -> None:
    """Refuse a reason that has a date: its writer expects that the deviation ends.

    Raises:
        ValueError: If it has a date; the past day on which something was seen is none, nor is a version.
    """
    found = _ENDED.search(reason)
    for dated in _DATED.finditer(reason):
        is_past = bool(_DATE.fullmatch(dated[0])) and dated[0] <= date.today().isoformat()
        before = reason[: dated.start()]
        if not (is_past and _SEEN.search(before)) and not _VERSION.search(before):
            found = found or dated
    if found is not None:
        raise ValueError(
            f"{place}: {found[0]!r} is a date within the reason, at which nothing would end; "
            f"expected the date as the last part of the line: {_EXACT}"
        )


def _cause_names() -> frozenset[str]:
    """Return every name of a cause."""
    from pytest_mistral_lora.chat.templates.faults import CAUSE_NAMES  # a list of rules does not need this import

    return CAUSE_NAMES


def ids_of(finding: Finding, nodeid: str) -> set[str]:
    """Return the ids by which a list of known deviations accepts a finding of a check."""
    return {finding.rule, nodeid, finding.name} - {""}


def matching(
    finding: Finding, nodeid: str, xfails: Iterable[Xfail], server: Callable[[], str] | None = None
) -> list[Xfail]:
    """Return the entries of a list of known deviations that are about a finding, those whose date has passed included.

    Args:
        finding: The finding.
        nodeid: The node id of the check that found it.
        xfails: The list.
        server: Returns the server that was judged, with its version, or an empty text; it is only called if the fault
            of a server can explain the finding. Without it, no version is asked.
    """
    ids = ids_of(finding, nodeid)
    return [
        xfail
        for xfail in xfails
        if xfail.id in ids or (xfail.is_of_fault and _is_explained(finding, nodeid, xfail, server))
    ]


def _is_explained(finding: Finding, nodeid: str, xfail: Xfail, server: Callable[[], str] | None) -> bool:
    """Return whether the known fault of an entry can explain a finding, under the versions of the run."""
    from pytest_mistral_lora.environment import installed_versions
    from pytest_mistral_lora.programs.facts import Symptom, fact

    subject, case = nodeid.split("::", 3)[2:]
    fault, symptom = fact(xfail.id), Symptom(finding.rule, finding.found, subject, case, name=finding.name)
    if server is None or not fault.explains(symptom):
        return fault.explains(symptom)
    if fault.program.kind == "server":
        symptom = replace(symptom, server=server())
    # a fault that has ended, and is still there, is still known
    return fault.standing_for(symptom, installed_versions()).state != "absent"


def standings_of(xfail: Xfail, servers: Iterable[str]) -> list[Standing]:
    """Return what the fact behind an entry says about the versions of a run: one standing, or one for each server.

    Args:
        xfail: The entry, which names a known fault.
        servers: The servers that were judged, as the summary names them.
    """
    from pytest_mistral_lora.environment import installed_versions
    from pytest_mistral_lora.programs.facts import fact

    fault = fact(xfail.id)
    if fault.program.kind == "server":
        return [fault.standing_of_server(server) for server in servers]
    return [fault.standing(installed_versions())]


def known_among(
    findings: Sequence[Finding], nodeid: str, xfails: Sequence[Xfail], server: Callable[[], str] = str
) -> list[Xfail]:
    """Return the known deviations that a finding of this check matches, without expired ones."""
    found = {xfail.id for finding in findings for xfail in matching(finding, nodeid, xfails, server)}
    return [xfail for xfail in xfails if not xfail.is_over and xfail.id in found]


def unknown_among(
    findings: Sequence[Finding], nodeid: str, xfails: Sequence[Xfail], server: Callable[[], str] = str
) -> list[Finding]:
    """Return the findings of this check that no known deviation covers; they name expired ones that they match."""
    unknown = []
    for finding in findings:
        matched = matching(finding, nodeid, xfails, server)
        if all(xfail.is_over for xfail in matched):
            unknown.append(_with_passed_dates(finding, matched))
    return unknown


def _with_passed_dates(finding: Finding, over: Sequence[Xfail]) -> Finding:
    if not over:
        return finding
    lines = [printable(f"accepted until {xfail.until} ({xfail.place}): {xfail.reason}", lines=False) for xfail in over]
    return replace(finding, detail="\n".join([*filter(None, [finding.detail]), *lines]))
