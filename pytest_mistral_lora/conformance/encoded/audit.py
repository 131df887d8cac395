"""One pass over an encoded-rows file: a verdict on each line, and then on the file as a whole."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.encoded.file_faults import Balance, SourceRows
from pytest_mistral_lora.conformance.encoded.line_faults import LineJudge
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, scan_lines
from pytest_mistral_lora.conformance.encoded.parts import CLASSES
from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.errors import OracleRejection, RowError, RowsError

State = Literal["sound", "wrong", "not judged"]

LOSES = frozenset({"ML515", "ML531", "ML533", "ML544", "ML551"})
"""Rules whose rows may lose whole answers: only those rows are counted again, the others have said what is wrong."""
MOST_ERRORS = 1000
"""Unreadable lines that are named; more are only counted."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of one line, or of the file as a whole.

    Attributes:
        index: The row's number in its source; None for a line that cannot be read, and for the file.
        place: File and line, or the file.
        state: `sound`, `wrong`, or `not judged` where mistral-common refuses the row or the line cannot be read.
        findings: What is wrong.
    """

    index: int | None
    place: str
    state: State
    findings: tuple[Finding, ...] = ()


class Audit:
    """The audit of a file, to be run once.

    Attributes:
        path: The encoded-rows file.
        states: How many rows are sound, wrong, and not judged.
        counts: Findings by rule.
        tokens: Tokens of all rows that were judged, without padding.
        supervised: Tokens of them that are trained on.
        packed: Lines that hold several conversations.
        errors: Lines that cannot be read, the first thousand.
    """

    def __init__(self, path: Path, oracle: Oracle, dataset: tuple[Path, ...] = ()) -> None:
        """Prepare the audit.

        Args:
            path: The encoded-rows file.
            oracle: Mistral's own tokenization.
            dataset: The chat JSONL files that the rows come from, in order, where they are at hand.
        """
        self.path = path
        self.states: Counter[State] = Counter()
        self.counts: Counter[str] = Counter()
        self.tokens = 0
        self.supervised = 0
        self.packed = 0
        self.errors: list[RowError] = []
        self._oracle = oracle
        self._source = SourceRows(dataset)
        self._balance = Balance()

    def verdicts(self) -> Iterator[Verdict]:
        """Yield a verdict for each line, and a last one for the file.

        Raises:
            InputError: If the file, or one of the dataset, cannot be opened.
            RowsError: If a row of the dataset cannot be read.
        """
        for item in scan_lines(self.path):
            verdict = self._unreadable(item) if isinstance(item, RowError) else self._line(self._source.numbered(item))
            self.states[verdict.state] += 1
            yield self._counted(verdict)
        findings = tuple(self._whole_file())
        yield self._counted(Verdict(None, str(self.path), "wrong" if findings else "sound", findings))

    def _counted(self, verdict: Verdict) -> Verdict:
        self.counts.update(finding.rule for finding in verdict.findings)
        return verdict

    def _unreadable(self, error: RowError) -> Verdict:
        self._source.unreadable += 1
        if len(self.errors) < MOST_ERRORS:
            self.errors.append(error)
        finding = Finding("ML501", error.found, error.place, error.expected)
        return Verdict(None, error.place, "not judged", (finding,))

    def _line(self, line: EncodedLine) -> Verdict:
        new = self._source.is_new(line)
        findings = list(self._source.findings(line))
        self.packed += line.packed
        if line.error:
            self._expect(line)
            return Verdict(line.index, line.place, "not judged", tuple(findings))
        try:
            judge = LineJudge(line, [self._oracle.encode(row) for row in line.rows], self._oracle)
        except OracleRejection as error:
            findings.append(Finding("ML507", error.found, error.place, error.expected, row=line.rows[0].to_jsonl()))
            return Verdict(line.index, line.place, "not judged", tuple(findings))
        judged = list(judge.findings())
        self.tokens += len(judge.padding.real)
        self.supervised += sum(label != IGNORE_INDEX for label in line.labels)
        self._count_texts(judge, new=new, rules={finding.rule for finding in judged})
        findings += judged
        return Verdict(line.index, line.place, "wrong" if findings else "sound", tuple(findings))

    def _expect(self, line: EncodedLine) -> None:
        """Note the answers of a dropped row; those of a dataset's row are noted when the file has ended."""
        for row in () if self._source.paths else line.rows:
            encoded = self._encoded(row)
            if encoded is not None:
                self._balance.expect(encoded, line.place)

    def _count_texts(self, judge: LineJudge, *, new: bool, rules: set[str]) -> None:
        if not judge.comparable or (new and not rules & LOSES):
            return
        for encoded in judge.expected if new else ():
            self._balance.expect(encoded, judge.line.place)
        self._balance.find(judge.ids, judge.labels, judge.line.place, self._oracle)

    def _whole_file(self) -> Iterator[Finding]:
        yield from self._source.gaps(self.path)
        for row in self._source.missing():
            encoded = self._encoded(row)
            if encoded is not None:
                self._balance.expect(encoded, row.place)
        yield from self._balance.findings(self.path, self._oracle)

    def _encoded(self, row: Row) -> EncodedRow | None:
        try:
            return self._oracle.encode(row)
        except OracleRejection:
            return None

    def raise_unreadable(self) -> None:
        """Raise what cannot be read of the file.

        Raises:
            RowsError: If lines could not be read.
        """
        if not self.errors:
            return
        more = self.counts["ML501"] - len(self.errors)
        rest = [RowError(f"{more} more lines cannot be read", place=str(self.path))] if more else []
        raise RowsError([*self.errors, *rest], place=str(self.path))


def write_text(audit: Audit, out: TextIO, show: int) -> bool:
    """Run an audit and print it for people; at most `show` findings of a class are printed, all are counted.

    Returns:
        Whether something that is an error was found.
    """
    shown: Counter[str] = Counter()
    for verdict in with_progress(audit):
        texts = []
        for finding in verdict.findings:
            shown[finding.rule] += 1
            texts += [finding.text()] if shown[finding.rule] <= show else []
        if texts:
            out.write(_verdict_line(verdict) + "\n" + "\n".join(texts) + "\n\n")
    out.write(_table(audit, shown, show))
    return _failed(audit)


def write_json(audit: Audit, out: TextIO) -> bool:
    """Run an audit and print it as JSON Lines, a finding a line, then the summary.

    Returns:
        Whether something that is an error was found.
    """
    for verdict in with_progress(audit):
        for finding in verdict.findings:
            extra = {"class": CLASSES[finding.rule], "index": verdict.index, "state": verdict.state}
            out.write(json.dumps({**finding.to_json(), **extra}, ensure_ascii=False) + "\n")
    out.write(json.dumps({"summary": summary(audit)}, ensure_ascii=False) + "\n")
    return _failed(audit)


def summary(audit: Audit) -> dict[str, Any]:
    """Return what an audit that has run came to, as plain JSON data."""
    classes = [{"rule": rule, "class": CLASSES[rule], "count": n} for rule, n in sorted(audit.counts.items())]
    return {
        "rows": audit.states.total(),
        "sound": audit.states["sound"],
        "wrong": audit.states["wrong"],
        "not_judged": audit.states["not judged"],
        "packed": audit.packed,
        "tokens": audit.tokens,
        "supervised_tokens": audit.supervised,
        "findings": audit.counts.total(),
        "classes": classes,
    }


def _failed(audit: Audit) -> bool:
    return any(RULES[rule].severity == "error" for rule in audit.counts)


def _verdict_line(verdict: Verdict) -> str:
    classes = ", ".join(dict.fromkeys(CLASSES[finding.rule] for finding in verdict.findings))
    what = "file" if verdict.index is None else f"row {verdict.index}"
    return f"{verdict.place}: {what}: {verdict.state}: {classes}"


def _table(audit: Audit, shown: Counter[str], show: int) -> str:
    lines = [f"{'rule':<6}  {'class':<26}  {'found':>9}"] if audit.counts else []
    for rule, count in sorted(audit.counts.items()):
        rest = f"  {show} shown" if shown[rule] > show else ""
        lines.append(f"{rule:<6}  {CLASSES[rule]:<26}  {count:>9}{rest}")
    data = summary(audit)
    rows = f"{data['rows']} rows: {data['sound']} sound, {data['wrong']} wrong, {data['not_judged']} not judged"
    tokens = f"{data['supervised_tokens']} of {data['tokens']} tokens are trained on"
    found = f"{data['findings']} finding{'' if data['findings'] == 1 else 's'}"
    return "\n".join([*lines, rows, tokens, found]) + "\n"


def with_progress(audit: Audit) -> Iterator[Verdict]:
    """Yield an audit's verdicts, with a progress bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield from audit.verdicts()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("rows", total=_count_lines(audit.path))
        for verdict in audit.verdicts():
            progress.advance(task)
            yield verdict


def _count_lines(path: Path) -> int | None:
    """Return the lines of a file, and one for the verdict on it; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b"")) + 1
    except OSError:
        return None
