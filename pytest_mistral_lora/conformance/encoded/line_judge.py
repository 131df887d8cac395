"""The verdict on each record of encoded rows, by itself: parts of a file are judged in any process.

What depends on the order of records, such as a number that comes again, is the collecting process's: see `audit`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.objective import ANSWERS, Declaration, Objective
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading.row_source import SourceRecord
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.dataset.observers import RowRules
from pytest_mistral_lora.conformance.encoded.audit_state import AuditState
from pytest_mistral_lora.conformance.encoded.comparison import EncodedLineComparison
from pytest_mistral_lora.conformance.encoded.evaluation import EvaluationJudge
from pytest_mistral_lora.conformance.encoded.file_faults import AnswerBalance
from pytest_mistral_lora.conformance.encoded.line_labels import LineLabels, candidates, labels_of
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, TakenLine, lines_of
from pytest_mistral_lora.conformance.encoded.packing import PositionScaling
from pytest_mistral_lora.conformance.encoded.pad_cause import PadCause
from pytest_mistral_lora.conformance.encoded.read_lines import LineReader, ReadLine
from pytest_mistral_lora.conformance.encoded.side_faults import SideJudge
from pytest_mistral_lora.conformance.encoded.template_cause import TemplateCause
from pytest_mistral_lora.conformance.finding import RULES, Finding
from pytest_mistral_lora.conformance.row_pass import GivenIds, JudgedRecord, Origin
from pytest_mistral_lora.errors import OracleRejection, RowError, UncheckedRowError
from pytest_mistral_lora.places import NamedSource, Place

State = Literal["sound", "wrong", "not judged"]

LOSES = frozenset({"ML515", "ML531", "ML533", "ML544", "ML551", "ML605"})
"""Rules whose rows may lose whole answers. Only texts of these rows are counted over the file."""
_SAID_BY_IDS: Mapping[str, frozenset[str]] = {
    # the text did become a token, not only may it
    "ML612": frozenset(("ML523",)),
    # the answer of a pair is empty in the ids
    "ML616": frozenset(("ML567",)),
    # the ids of both answers are equal, whole or after a cut
    "ML655": frozenset(("ML655", "ML568")),
}
"""Rules of chat rows, each with the rules of ids that say the same of one row."""
MOST_ERRORS = 1000
"""Most unreadable lines to name; more are only counted."""


@dataclass(frozen=True, slots=True)
class LineVerdict:
    """The findings of one line, or of the file as a whole.

    Attributes:
        index: The row's number in its source; None for a line that cannot be read, and for the file.
        place: File and line, or the file.
        state: `sound`, `wrong`, or `not judged` if mistral-common refuses the row or the line cannot be read.
        findings: The broken rules.
        labels: What its labels say about the objective of the run; None if they say nothing, or one is declared.
    """

    index: int | None
    place: Place
    state: State
    findings: tuple[Finding, ...] = ()
    labels: LineLabels | None = None


class _ObservedSide(NamedTuple):
    """A side of a preference record, with its encoding by mistral-common."""

    line: EncodedLine
    row: Row
    encoded: EncodedRow


class LineTracker(Protocol):
    """What knows the rows of a dataset beside the lines."""

    def with_messages(self, line: EncodedLine) -> EncodedLine:
        """Return a line with the messages of its number."""

    def numbered(self, line: EncodedLine) -> EncodedLine:
        """Return a line with its number."""

    def is_new(self, line: EncodedLine) -> bool:
        """Return whether no line before has its number."""

    def take(self, line: EncodedLine) -> list[Finding]:
        """Note a line, and return the findings about its place in the dataset."""


class LaterTracker:
    """Notes the lines of a part for the process that collects the parts, which knows those before.

    Attributes:
        taken: The lines.
    """

    def __init__(self) -> None:
        self.taken: list[TakenLine] = []

    def with_messages(self, line: EncodedLine) -> EncodedLine:
        """Return the line: there is no dataset."""
        return line

    def numbered(self, line: EncodedLine) -> EncodedLine:
        """Return the line: there is no dataset."""
        return line

    def is_new(self, line: EncodedLine) -> bool:
        """Return true: the collecting process corrects what is counted of a number that comes again."""
        return True

    def take(self, line: EncodedLine) -> list[Finding]:
        """Note a line; there is no finding yet."""
        self.taken.append(TakenLine.of(line))
        return []


@dataclass(frozen=True, slots=True)
class RecordPart:
    """Some records of a source, in order.

    Attributes:
        first: The number of records before them.
        records: The records.
        files: The index of each file, by its source and split.
        size: Number of bytes that were read for them.
    """

    first: int
    records: Sequence[SourceRecord]
    files: Mapping[tuple[NamedSource, str | int | None], int]
    size: int


@dataclass
class AuditPart:
    """The verdicts on the records of a part.

    Attributes:
        verdicts: The verdict on each line, in order.
        taken: What the sequence needs of each line that can be read; empty if a dataset is at hand.
        unreadable: The errors of lines that cannot be read.
        state: What the lines add up to.
    """

    verdicts: list[LineVerdict]
    taken: list[TakenLine]
    unreadable: list[RowError]
    state: AuditState


class LineJudge:
    """Judges the records of parts."""

    def __init__(
        self,
        oracle: Oracle,
        scaling: PositionScaling,
        *,
        path: Path | None = None,
        judges_texts: bool = True,
        evaluation: EvaluationJudge | None = None,
        cause: TemplateCause | None = None,
        pad: PadCause | None = None,
        declared: Declaration | None = None,
    ) -> None:
        """Prepare the judge.

        Args:
            oracle: Mistral's own tokenization.
            scaling: The model's use of positions.
            path: The file or folder, for the next steps of findings; None if the rows are in no file of the user.
            judges_texts: As for `Audit`.
            evaluation: The judge of the prompts of an evaluation, with the rows that are known.
            cause: As for `Audit`.
            pad: As for `Audit`.
            declared: As for `Audit`.
        """
        self._oracle = oracle
        self._scaling = scaling
        self._cause = cause
        self._pad = pad
        self._declared = declared
        self._path = path
        self._reader = LineReader(oracle, path, weighs=declared is None)
        self._agreed: frozenset[Objective] = frozenset()
        self._rules = RowRules(oracle) if judges_texts else None
        self._evaluation = evaluation or EvaluationJudge()
        self._other_side: _ObservedSide | None = None
        self._has_dataset = False
        self._tracker: LineTracker = LaterTracker()
        self._files: Mapping[tuple[NamedSource, str | int | None], int] = {}
        self._state = AuditState()
        self._sides = SideJudge(oracle, self._state.sides)

    def judge(self, part: RecordPart, tracker: LineTracker | None = None) -> AuditPart:
        """Return the verdicts on the records of a part.

        Args:
            part: The part.
            tracker: What knows the dataset beside the lines; None if there is no dataset.
        """
        later = LaterTracker()
        self._has_dataset = tracker is not None
        self._tracker = later if tracker is None else tracker
        self._files = part.files
        self._state = AuditState()
        self._sides = SideJudge(self._oracle, self._state.sides)
        self._agreed = candidates(self._oracle) if self._declared is None else frozenset()
        self._reader.begin()
        if self._cause is not None:
            self._cause.begin()
        verdicts, unreadable = [], []
        for item in lines_of(part.records, part.first, has_source=self._has_dataset):
            if self._is_refused_again(item):
                continue
            try:
                verdict = self._take_item(item)
            except UncheckedRowError as error:
                self._note_unchecked(error.reason, error.place)
                verdict = LineVerdict(None, error.place, "not judged")
            except RowError as error:
                unreadable.append(error)
                finding = Finding("ML501", error.found, error.place, error.expected, error.next_step)
                verdict = LineVerdict(None, error.place, "not judged", (finding,))
            if verdict.labels is not None:
                self._agreed &= verdict.labels.fits
            verdicts.append(verdict)
        return AuditPart(verdicts, later.taken, unreadable, self._state)

    def _note_unchecked(self, reason: str, place: Place) -> None:
        self._state.rows.look_at(self._files[place.source, place.split], place.row)
        self._state.rows.unchecked.take(reason, self._state.rows.findings.at, place)

    def _take_item(self, item: EncodedLine | RowError) -> LineVerdict:
        """Return the verdict on a line.

        Raises:
            RowError: If the record is no line, or takes no objective, and one is declared.
        """
        if isinstance(item, RowError):
            raise item
        return self._take_line(item)

    def _is_refused_again(self, item: EncodedLine | RowError) -> bool:
        """Return whether a line is the second side of a pair whose first side has the error of the record."""
        is_second = isinstance(item, EncodedLine) and item.chosen is not None
        return is_second and not self._objective.is_default

    def use(self, objective: Objective) -> None:
        """Judge further lines by an objective that all lines have agreed on."""
        self._declared = Declaration(objective, "")
        self._reader = LineReader(self._oracle, self._path, weighs=False)

    @property
    def counts_texts(self) -> bool:
        """Whether the texts that are trained on are answers, whose numbers can be compared over the file."""
        return self._objective.is_of_turns

    @property
    def _objective(self) -> Objective:
        """The declared objective; `answers` if none is declared, or no word expresses it."""
        return (None if self._declared is None else self._declared.objective) or ANSWERS

    @property
    def _judges_labels(self) -> bool:
        return self._declared is None or self._declared.objective is not None

    def _under_objective(self, row: Row) -> Row:
        """Return a row with the declared objective.

        Raises:
            RowError: If it is a pair, or of another kind that takes no objective.
        """
        return row if self._objective.is_default else row.with_objective(self._objective)

    def _line_under_objective(self, line: EncodedLine) -> EncodedLine:
        """Return a line whose conversations have the declared objective.

        Raises:
            RowError: As for `_under_objective`; also for a side of a pair that has ids alone.
        """
        # a prompt of an evaluation is not trained on
        if self._objective.is_default or line.few_shot is not None:
            return line
        if line.side is not None:
            raise line.side.kind.without_objective(self._objective, line.place.row)
        rows, as_stored = (tuple(map(self._under_objective, rows)) for rows in (line.rows, line.as_stored))
        return replace(line, rows=rows, as_stored=as_stored)

    def _comparison(
        self, line: EncodedLine, expected: Sequence[EncodedRow], origin: Origin = "written"
    ) -> EncodedLineComparison:
        return EncodedLineComparison(line, expected, self._oracle, self._scaling, self._judges_labels, origin)

    def take_again(self, line: EncodedLine, balance: AnswerBalance) -> None:
        """Count the answers of a line that was judged as a new row's, and whose number came before.

        A new row's answers are on both sides; a row that comes again has its answers on the side of the trained alone.

        Args:
            line: The line.
            balance: The balance.
        """
        line = self._as_encoded(self._line_under_objective(line))
        if line.error:
            for row in line.rows:
                self.expected_answers(row, line.place, -1, balance)
            return
        if line.rows:
            try:
                expected = tuple(self._oracle.encode(row) for row in line.rows)
            except OracleRejection:
                return
        else:
            read = self._read(line)
            line, expected = read.line, read.expected
        comparison = self._comparison(line, expected)
        if not expected or line.few_shot is not None or not comparison.comparable:
            return
        if LOSES.intersection(finding.rule for finding in comparison.findings()):
            # what it is trained on is counted already
            for encoded in expected:
                balance.add(encoded.input_ids, encoded.labels or (), self._oracle, line.place, -1)
        else:
            balance.add(comparison.ids, comparison.labels, self._oracle, line.place, -1)

    def expected_answers(self, row: Row, place: Place, by: int, balance: AnswerBalance) -> None:
        """Count the answers of a row as mistral-common encodes them; a row that it refuses has none.

        Args:
            row: The row.
            place: Its place.
            by: As for `AnswerBalance.add`.
            balance: The balance.
        """
        try:
            encoded = self._oracle.encode(self._under_objective(row))
        except (OracleRejection, RowError):
            return
        balance.add(encoded.input_ids, encoded.labels or (), self._oracle, place, by)

    def _take_line(self, line: EncodedLine) -> LineVerdict:
        line = self._as_encoded(self._line_under_objective(self._tracker.with_messages(line)))
        line = self._tracker.numbered(line)
        new = self._tracker.is_new(line)
        findings = self._tracker.take(line)
        asked = tuple(self._evaluation.findings(line, self._state.prompts))
        if asked and not line.rows:
            return LineVerdict(line.index, line.place, "wrong", asked)
        findings += asked
        shown = line.rows[0].to_jsonl() if line.rows and line.faults else ""
        findings += (Finding(one.rule, one.found, line.place, one.expected, row=shown) for one in line.faults)
        self._state.figures.masked += line.masked
        self._state.figures.columns.update(() if line.error else line.columns)
        is_empty = line.side is not None and self._sides.is_empty(line.side)
        if line.side is not None:
            findings += self._sides.take(line, line.side)
            if is_empty and not line.rows:
                # no conversation can be read back from it
                return LineVerdict(line.index, line.place, "wrong", tuple(findings))
        if not (line.rows or line.error or self._has_dataset):
            if self._oracle.image_sizes is None and not self._oracle.block_ids.isdisjoint(line.input_ids):
                self._note_unchecked("image (the tokenizer file has no settings of images)", line.place)
                return LineVerdict(line.index, line.place, "not judged", tuple(findings))
            read = self._read(line)
            if read.findings and (explained := self._explained(line, read.findings)) is not None:
                self._state.figures.read_back += 1
                return LineVerdict(line.index, line.place, "wrong", (*findings, *explained))
            findings += read.findings
            if not read.expected:
                return LineVerdict(line.index, line.place, "not judged", tuple(findings))
            self._state.figures.read_back += 1
            self._state.figures.without_labels += read.without_labels
            self._state.figures.packed += read.line.packed
            return self._compare(read.line, read.expected, findings, new=new, origin="read back")
        self._state.figures.packed += line.packed
        if line.error or not line.rows:
            # A source knows its answers better than a row that the trainer wrote beside its error.
            for row in () if self._has_dataset else line.rows:
                self.expected_answers(row, line.place, 1, self._state.balance)
            return LineVerdict(line.index, line.place, "not judged", tuple(findings))
        try:
            expected = [self._oracle.encode(row) for row in line.rows]
        except UncheckedRowError as error:
            self._note_unchecked(error.reason, error.place)
            return LineVerdict(line.index, line.place, "not judged", tuple(findings))
        except OracleRejection as error:
            if is_empty:
                # the message is empty as well
                return LineVerdict(line.index, line.place, "wrong", tuple(findings))
            findings.append(Finding("ML507", error.found, error.place, error.expected, row=line.rows[0].to_jsonl()))
            return LineVerdict(line.index, line.place, "not judged", tuple(findings))
        return self._compare(line, expected, findings, new=new)

    def _compare(
        self,
        line: EncodedLine,
        expected: Sequence[EncodedRow],
        findings: list[Finding],
        *,
        new: bool,
        origin: Origin = "written",
    ) -> LineVerdict:
        """Return the verdict on a line with conversations.

        Args:
            line: The line.
            expected: mistral-common's encoding of each conversation.
            findings: The findings about the line so far.
            new: Whether no line before it has its number.
            origin: Where its messages come from.
        """
        comparison = self._comparison(line, expected, origin)
        of_tokens = list(comparison.findings())
        if any(RULES[finding.rule].case == "ids" for finding in of_tokens):
            explained = self._explained(line, of_tokens)
            if explained is not None:
                return LineVerdict(line.index, line.place, "wrong", (*findings, *explained))
        restored = self._pad.restored(comparison) if self._pad is not None else None
        if restored is not None and self._pad is not None:
            without = list(restored.findings())
            self._state.by_pad.take(of_tokens, without)
            of_tokens = without
        self._state.figures.tokens += len(comparison.padding.real)
        self._state.figures.run_on += comparison.runs_on
        if line.side is None or line.side.has_labels:
            self._state.figures.has_labels = True
            self._state.figures.supervised += len(line.labels) - line.labels.count(IGNORE_INDEX)
        else:
            self._state.figures.is_scored_whole = True
        is_trained = line.few_shot is None
        labels = None
        if self._agreed and is_trained and restored is None and line.side is None:
            labels = labels_of(comparison, self._agreed, is_written=origin == "written")
        # what follows another objective in all lines is lost by no fault
        follows = new and labels is not None and labels.is_other and bool(labels.fits)
        balance = self._state.following if follows else self._state.balance
        # The answers of a sound row are on both sides, and a row with another fault is reported for that fault.
        losing = next((finding.rule for finding in of_tokens if finding.rule in LOSES), "")
        if is_trained and comparison.comparable and self.counts_texts and (losing or not new):
            for encoded in expected if new else ():
                balance.add(encoded.input_ids, encoded.labels or (), self._oracle, line.place, 1, losing)
            balance.add(comparison.ids, comparison.labels, self._oracle, line.place, -1)
        findings += of_tokens
        if not is_trained:
            self._state.figures.asks = True
            return LineVerdict(line.index, line.place, "wrong" if findings else "sound", tuple(findings))
        is_wrong = bool(findings) or restored is not None
        whole = tuple(chain.from_iterable(encoded.input_ids for encoded in expected))
        # what was read back is judged only if it gives the ids again: else the ids have a finding
        if origin == "written" or comparison.ids == whole:
            given = GivenIds(comparison.ids, comparison.labels)
            observed = self._observe(line, expected, origin, given, is_exact=not of_tokens, new=new)
            # what the ids show already is no second finding of their messages
            shown = {finding.rule for finding in findings}
            observed = [one for one in observed if shown.isdisjoint(_SAID_BY_IDS.get(one.rule, ()))]
            is_wrong |= any(finding.severity == "error" for finding in observed)
            findings += observed
        return LineVerdict(line.index, line.place, "wrong" if is_wrong else "sound", tuple(findings), labels)

    def _observe(
        self,
        line: EncodedLine,
        expected: Sequence[EncodedRow],
        origin: Origin,
        given: GivenIds,
        *,
        is_exact: bool,
        new: bool,
    ) -> list[Finding]:
        """Show the conversations of a line to the rules on rows, and return their findings about these alone.

        Args:
            line: The line.
            expected: mistral-common's encoding of each conversation.
            origin: Where the messages come from.
            given: The ids and labels of the line, without padding.
            is_exact: Whether ids and labels are mistral-common's: else the answers are not decoded.
            new: Whether no line before it has its number: else it is known as a repeated line already.
        """
        if self._rules is None:
            return []
        found: list[Finding] = []
        seen = self._state.rows
        file = self._files[line.place.source, line.place.split]
        for row, encoded in zip(line.rows, expected, strict=True):
            # one that cannot be read back, or no conversation on a side of a pair
            if not row.messages or (line.side is not None and not row.kind.is_chat):
                continue
            if row.kind.is_chat:
                self._state.figures.conversations += 1
            else:
                self._state.figures.other_kinds[row.kind.row_title] += 1
            seen.look_at(file, line.place.row)
            if line.chosen is None:
                self._rules.begin_record()
                seen.counts[file, "judged"] += 1
            observed = [*self._rules.observe_row(row, encoded, encoded if is_exact else None, seen, origin=origin)]
            if new:
                observed += self._observe_record(_ObservedSide(line, row, encoded), origin, given, is_exact=is_exact)
            shown = row.to_jsonl() if observed else ""
            found += (replace(finding, row=finding.row or shown) for finding in observed)
        return found

    def _observe_record(
        self, side: _ObservedSide, origin: Origin, given: GivenIds, *, is_exact: bool
    ) -> Iterator[Finding]:
        """Show a record to the rules, and yield its findings: of a pair, when its second side has come."""
        if self._rules is None:
            return
        line = side.line
        sides: tuple[_ObservedSide, ...] = (side,)
        if line.side is not None and line.side.is_of_pair:
            if line.chosen is None:
                self._other_side = side
                return
            first, self._other_side = self._other_side, None
            if first is None or first.line.place.row != line.place.row:
                return  # the chosen side could not be judged
            sides = (first, side)
        encodings = tuple(each.encoded for each in sides)
        record = JudgedRecord(
            line.place.row,
            tuple(each.row for each in sides),
            encodings,
            encodings,
            origin,
            given=given,
            is_exact=is_exact,
            joins_system=self._oracle.facts.system_in != "own-turn",
            declared=line.declared,
            file=self._state.rows.file,
        )
        yield from self._rules.observe_record(record, self._state.rows)

    def _explained(self, line: EncodedLine, before: Sequence[Finding]) -> list[Finding] | None:
        """Return the findings of a line that the chat template does not explain; None if the line is not encoded by it.

        Args:
            line: The line.
            before: Its findings by mistral-common's encoding.
        """
        found = None if self._cause is None else self._cause.encode(line, self._oracle, self._objective)
        if found is None or self._cause is None:
            return None
        line, encoded = found
        comparison = self._comparison(line, encoded)
        after = list(comparison.findings())
        self._state.by_template.take(before, after)
        self._state.figures.tokens += len(comparison.padding.real)
        if line.side is None or line.side.has_labels:
            self._state.figures.has_labels = True
            self._state.figures.supervised += len(line.labels) - line.labels.count(IGNORE_INDEX)
        return after

    def _read(self, line: EncodedLine) -> ReadLine:
        """Return a line with the conversations that its ids are read back into, under the declared objective."""
        read = self._reader.read(line)
        if self._objective.is_default:
            return read
        line, expected = self._line_under_objective(read.line), []
        for row, encoded in zip(line.rows, read.expected, strict=True):
            # one that cannot be read back stands for itself
            weighed = encoded.weighed_as(row, self._oracle.control_ids) if row.messages else encoded
            expected.append(encoded if weighed is None else weighed)
        return replace(read, line=line, expected=tuple(expected))

    def _as_encoded(self, line: EncodedLine) -> EncodedLine:
        """Return a row of a table with the nulls that the table gave its calls and tools, if its ids have them, too."""
        with suppress(OracleRejection):
            for rows in filter(None, (line.as_stored and line.rows, line.as_stored)):
                if _hold(line.input_ids, [self._oracle.encode(row) for row in rows]):
                    return replace(line, rows=rows)
        return line


def _hold(ids: Sequence[int], rows: Sequence[EncodedRow]) -> bool:
    """Return whether some ids contain each of some rows, with padding and other rows around it."""
    wanted = [encoded.input_ids for encoded in rows]
    firsts, size = {row[0] for row in wanted}, min(map(len, wanted), default=0)
    # found by as many ids as the shortest row has: a packed sequence has thousands of rows
    starts: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for n, token in enumerate(ids):
        if token in firsts:
            starts[tuple(ids[n : n + size])].append(n)
    return all(any(tuple(ids[n : n + len(row)]) == row for n in starts.get(row[:size], ())) for row in wanted)
