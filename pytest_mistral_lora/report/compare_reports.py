"""What is new since another report: the causes of two runs, compared by their keys."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError, counted, named_value
from pytest_mistral_lora.escaping import code_span, in_markdown, printable
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.schema import RecordSchema, require_valid

SCHEMA = RecordSchema(Path(__file__).with_name("report.schema.json"))

State = Literal["new", "worse", "unchanged", "known", "not judged", "fixed"]
STATES: tuple[State, ...] = get_args(State)
"""What became of a cause of the first report in the second, in the order in which it is shown.

`not judged`: its check could not run, or was left out. `fixed`: its check ran, and found nothing.
"""
MARK = "<!-- mistral-lora compare -->"
"""The first line of the Markdown: by it, a job finds the comment that it wrote before."""
_LONGEST = 160
_MOST_SHOWN = 50
_LONGEST_COMMENT = 65_536
"""The most characters of a comment; GitHub refuses a longer one."""
_WATCHED = ("answer", "server", "transcript", "user transcripts")
"""The subjects of checks that ask a model: what they record of its answers can move while nothing fails."""
_CUT = "The rest is left out: a comment has at most 65,536 characters. `mistral-lora compare` prints all."


def read_report(path: Path) -> dict[str, Any]:
    """Return a report of `check --json`, `check --report FILE.json` or `pytest --mistral-report FILE.json`.

    Raises:
        InputError: If the file cannot be read, or is not such a report.
    """
    data = read_json(path)
    if not isinstance(data, dict) or "causes" not in data:
        raise InputError(
            "not a report",
            place=str(path),
            expected="the file of `mistral-lora check --report FILE.json` or `pytest --mistral-report FILE.json`",
        )
    require_valid(SCHEMA.violations(data), "report", path)
    return data


@dataclass(frozen=True)
class ComparedCause:
    """A cause of two reports.

    Attributes:
        state: What became of it.
        cause: Its data: the second report's, or else the first one's.
        before: Its findings in the first report.
        after: Its findings in the second.
        reason: Why it is accepted, or could not be judged; empty for other states.
    """

    state: State
    cause: Mapping[str, Any]
    before: int
    after: int
    reason: str = ""

    @property
    def fails(self) -> bool:
        """Whether it is an error that the first report does not have to this extent."""
        return self.state in ("new", "worse") and self.cause["severity"] == "error"

    @property
    def text(self) -> str:
        """The rule, what was found, its place, and how the number of findings changed, in one line."""
        place, structured = self.cause["place"], self.cause.get("structured")
        # reports of earlier versions have a place as text alone
        field = Place.from_json(structured["place"]).field if structured else ""
        found = _cut(named_value(self.cause["found"], field, self.cause["title"]))
        numbers = counted(self.after or self.before, "finding")
        if self.before and self.after and self.before != self.after:
            numbers += f", {self.before} before"
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.cause['rule']} {found}{f' - {place}' if place else ''} ({numbers}){reason}"

    @property
    def table_row(self) -> str:
        """The row of a table of Markdown: the state, the text, and the fix of a cause that is there now."""
        fix = self.cause["fix"] if self.after else ""
        return f"| {self.state} | {code_span(self.text, in_table=True)} | {code_span(fix, in_table=True)} |"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        keys = ("rule", "severity", "title", "found", "place", "cause", "check")
        numbers = {"before": self.before, "after": self.after}
        return {"state": self.state, **{key: self.cause[key] for key in keys}, **numbers, "reason": self.reason}


@dataclass(frozen=True)
class ReportComparison:
    """Two reports of the same checks at two commits.

    Attributes:
        before: The first report, such as that of the main branch.
        after: The second, such as that of a change.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any]

    @cached_property
    def causes(self) -> tuple[ComparedCause, ...]:
        """Every cause of the two, in the order of `STATES`, errors first."""
        return tuple(
            sorted(self._compared(), key=lambda found: (STATES.index(found.state), found.cause["severity"] != "error"))
        )

    @cached_property
    def counts(self) -> dict[State, int]:
        """The number of causes in each state."""
        found = Counter(compared.state for compared in self.causes)
        return {state: found[state] for state in STATES}

    @cached_property
    def unchecked(self) -> dict[str, str]:
        """The reason of each check that could judge in the first report, and not in the second, by its node id."""
        judged = {check["nodeid"] for check in self.before["checks"] if check["outcome"] != "skipped"}
        return {
            check["nodeid"]: check["not_checked"]
            for check in self.after["checks"]
            if check["nodeid"] in judged and check["outcome"] == "skipped"
        }

    @cached_property
    def moved(self) -> dict[str, str]:
        """What checks that ask a model have recorded otherwise than in the first report, by their node ids."""
        watched = (check for check in self.before["checks"] if {*check["nodeid"].split("::")[2:3]} & {*_WATCHED})
        old = {check["nodeid"]: check for check in watched}
        found = {}
        for check in filter(lambda check: check["nodeid"] in old, self.after["checks"]):
            before, after = old[check["nodeid"]]["facts"], check["facts"]
            changed = [name for name in before if name in after and before[name] != after[name]]
            if changed:
                found[check["nodeid"]] = "; ".join(f"{name}: {before[name]} → {after[name]}" for name in changed)
        return found

    @property
    def fails(self) -> bool:
        """Whether an error is new or worse."""
        return any(compared.fails for compared in self.causes)

    @property
    def verdict(self) -> str:
        """The numbers in one line."""
        numbers = [f"{count} {state}" for state, count in self.counts.items() if count or state in ("new", "fixed")]
        more = f"; {counted(len(self.unchecked), 'check')} could not run any more" if self.unchecked else ""
        more += f"; {counted(len(self.moved), 'record')} of answers moved" if self.moved else ""
        return f"{', '.join(numbers)}{more}"

    def _compared(self) -> Iterator[ComparedCause]:
        old = {cause["cause"]: cause for cause in self.before["causes"]}
        for cause in self.after["causes"]:
            before = old.pop(cause["cause"], None)
            state: State = "new"
            if before is not None:
                state = "worse" if cause["count"] > before["count"] else "unchanged"
            yield ComparedCause(state, cause, before["count"] if before else 0, cause["count"])
        checks = {check["nodeid"].partition("::")[2]: check for check in self.after["checks"]}
        for cause in old.values():
            yield self._gone(cause, checks.get(cause["check"]))

    def _gone(self, cause: Mapping[str, Any], check: Mapping[str, Any] | None) -> ComparedCause:
        """Return what became of a cause that the second report does not have.

        Args:
            cause: The cause.
            check: The check that found it, in the second report; None if it is not there.
        """
        if check is None:
            return ComparedCause("not judged", cause, cause["count"], 0, f"{cause['check']} did not run")
        if check["outcome"] == "skipped":
            return ComparedCause("not judged", cause, cause["count"], 0, check["not_checked"])
        names = {cause["rule"], cause["name"], check["nodeid"]}
        accepted = next((known["reason"] for known in check["known"] if known["id"] in names), None)
        if accepted is not None:
            return ComparedCause("known", cause, cause["count"], 0, accepted)
        return ComparedCause("fixed", cause, cause["count"], 0)

    def _versions(self) -> list[str]:
        """Return the libraries whose versions differ, as `transformers 5.23.0 → 5.24.0`."""
        old, new = ({**report["libraries"], "Python": report["python"]} for report in (self.before, self.after))
        return [
            f"{name} {old.get(name, 'none')} → {new.get(name, 'none')}"
            for name in dict.fromkeys([*old, *new])
            if old.get(name) != new.get(name)
        ]

    def lines(self) -> list[str]:
        """Return the comparison for a terminal: the verdict, then a line for each cause."""
        lines = [self.verdict]
        lines += [f"other versions: {', '.join(changed)}"] if (changed := self._versions()) else []
        width = max(map(len, STATES))
        lines += [f"{found.state:<{width}}  {found.text}" for found in self.causes]
        lines += [f"{'moved':<{width}}  {nodeid}: {_cut(text)}" for nodeid, text in self.moved.items()]
        lines += [f"{'not checked':<{width}}  {nodeid}: {reason}" for nodeid, reason in self.unchecked.items()]
        return [printable(line, lines=False) for line in lines]

    def markdown(self) -> str:
        """Return the comparison as Markdown for a comment, with `MARK` in front.

        Texts of the reports are in code, where GitHub finds no mention, reference or link. A comment that would be too
        long for GitHub is cut, and says so.
        """
        lines = [MARK, f"**mistral-lora**: {in_markdown(self.verdict)}", ""]
        lines += [f"Other versions: {code_span(', '.join(changed))}", ""] if (changed := self._versions()) else []
        shown = [found for found in self.causes if found.state != "unchanged"]
        rows = [found.table_row for found in shown[:_MOST_SHOWN]]
        if shown:
            rows = ["| | cause | fix |", "|---|---|---|", *rows]
            rows += [f"| | … and {len(shown) - _MOST_SHOWN} more | |"] if len(shown) > _MOST_SHOWN else []
        for nodeid, text in list(self.moved.items())[:_MOST_SHOWN]:
            rows += ["", f"Moved: {code_span(f'{nodeid}: {_cut(text)}')}"]
        for nodeid, reason in list(self.unchecked.items())[:_MOST_SHOWN]:
            rows += ["", f"Not checked any more: {code_span(f'{nodeid}: {reason}')}"]
        return "\n".join(_fitting([*lines, *rows])) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as plain JSON data."""
        return {
            "verdict": self.verdict,
            "counts": self.counts,
            "causes": [found.to_json() for found in self.causes],
            "unchecked": self.unchecked,
            "moved": self.moved,
        }


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _fitting(lines: Sequence[str]) -> list[str]:
    """Return the first lines that fit into a comment; if not all do, with a line at the end that says so."""
    # GitHub does not say what it counts: a character that UTF-16 writes as two counts as two here
    sizes = [len(line.encode("utf-16-le")) // 2 + 1 for line in lines]
    if sum(sizes) <= _LONGEST_COMMENT:
        return list(lines)
    room, kept = _LONGEST_COMMENT - len(_CUT) - 2, 0
    while (room := room - sizes[kept]) >= 0:
        kept += 1
    return [*lines[:kept], "", _CUT]
