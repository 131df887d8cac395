"""One pass over an encoded-rows file: a verdict on each line and on the file, and the subject's checks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.fim import FimRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading.row_source import RowSource
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.dataset.answers import BY_GRAMMAR, NOT_BY_GRAMMAR, NOT_READ_BACK
from pytest_mistral_lora.conformance.dataset.file_rules import note_files
from pytest_mistral_lora.conformance.dataset.observers import RowRules
from pytest_mistral_lora.conformance.dataset.tally import DatasetTally
from pytest_mistral_lora.conformance.dataset.texts import markup_of
from pytest_mistral_lora.conformance.encoded.comparison import EncodedLineComparison
from pytest_mistral_lora.conformance.encoded.evaluation import EvaluationJudge
from pytest_mistral_lora.conformance.encoded.file_faults import AnswerBalance, SourceTracker
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, scan_lines
from pytest_mistral_lora.conformance.encoded.packing import PositionScaling
from pytest_mistral_lora.conformance.encoded.pad_cause import PadCause, pad_cause_of
from pytest_mistral_lora.conformance.encoded.read_lines import LineReader
from pytest_mistral_lora.conformance.encoded.side_faults import SideJudge
from pytest_mistral_lora.conformance.encoded.template_cause import TemplateCause, cause_of
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result, in_words, rest_of_findings
from pytest_mistral_lora.conformance.row_pass import GivenIds, JudgedRecord, Origin
from pytest_mistral_lora.conformance.targets import EncodedTarget
from pytest_mistral_lora.errors import OracleRejection, RowError, RowsError, counted
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.places import NamedSource, Place

State = Literal["sound", "wrong", "not judged"]

LOSES = frozenset({"ML515", "ML531", "ML533", "ML544", "ML551"})
"""Rules whose rows may lose whole answers. Only texts of these rows are counted over the file."""
MOST_ERRORS = 1000
"""Most unreadable lines to name; more are only counted."""
KEPT = 20
"""Most findings of a rule to keep; more are counted."""

OF_CHAT_ROWS = (
    "no-duplicates",
    "no-control-literals",
    "turns-stay-apart",
    "answers-are-not-empty",
    "texts-are-whole",
    "tool-calls-fit-the-tools",
    "statistics",
)
"""Checks of chat rows that judge the conversations of encoded rows, too, by their names in `rules/dataset.toml`."""
CASES = ("file", "rows-complete", "ids", "labels", "packing", "supervised-text", "answers", "decoding", *OF_CHAT_ROWS)
"""Every check of the subject: a rule names its check in `rules/encoded.toml` or `rules/dataset.toml`."""
_BY_CHAT_CASE = {"answers": "answers-are-read-back", "decoding": "decoding-allows-answers"}
"""Checks whose rules are those of a check of chat rows with another name."""
OF_ROWS = ("ids", "labels", "packing", "supervised-text", "answers", "decoding", *OF_CHAT_ROWS)
"""Checks that would pass on nothing if no row can be judged."""
NOTHING_JUDGED = "no row of the file can be judged"
_IMAGES_ALONE = "images: each row has ids of images, and no messages"
SCORED_WHOLE = "a reward model scores conversations as a whole: no token has a label"

CAUSES = {"ids": "ML004", "labels": "ML204"}
"""The rules of causes by the check that reports them: another chat template, and a pad token that is EOS."""
_UNREAD = ("ML560", "ML524", "ML532", "ML507")
"""Rules of ids that cannot be read back."""
WITHOUT_VERDICT = ("ML501", "ML507", *_UNREAD)
"""Rules of lines that cannot be read or encoded, which are not judged."""
_BY_IDS = frozenset({"ML655", "ML656", "ML659"})
"""Rules on pairs that encoded pairs are judged by in their ids alone."""
_NO_ROW = "no conversation of the file can be judged"


@dataclass(frozen=True, slots=True)
class LineVerdict:
    """The findings of one line, or of the file as a whole.

    Attributes:
        index: The row's number in its source; None for a line that cannot be read, and for the file.
        place: File and line, or the file.
        state: `sound`, `wrong`, or `not judged` if mistral-common refuses the row or the line cannot be read.
        findings: The broken rules.
    """

    index: int | None
    place: Place
    state: State
    findings: tuple[Finding, ...] = ()


class _ObservedSide(NamedTuple):
    """A side of a preference record, with its encoding by mistral-common."""

    line: EncodedLine
    row: Row
    encoded: EncodedRow


class Audit:
    """The audit of a file, to be run once.

    Attributes:
        rows: The encoded rows.
        states: Number of rows that are sound, wrong, and not judged.
        counts: Findings by rule.
        tokens: Tokens of all judged rows, without padding.
        supervised: Supervised tokens of the judged rows.
        packed: Lines that hold several conversations.
        masked: Lines whose labels come from a mask beside the ids.
        columns: Number of lines by each column that says what is trained on.
        read_back: Lines without messages, whose conversations are read back from their ids.
        without_labels: Answers of these lines without a label, which are read as answers of weight 0.
        images: Lines without messages whose ids have an image, which mistral-common encodes from its pixels alone.
        errors: Lines that cannot be read, the first thousand.
        scaling: The model's use of positions.
        source: The rows of the source that the file has had so far.
        sides: The answers of preference records, such as pairs, that the file has had so far.
    """

    def __init__(
        self,
        rows: RowSource,
        oracle: Oracle,
        dataset: tuple[Path, ...] = (),
        *,
        base: Path | None = None,
        judges_texts: bool = True,
        trained: Sequence[Row] = (),
        cause: TemplateCause | None = None,
        pad: PadCause | None = None,
    ) -> None:
        """Prepare the audit.

        Args:
            rows: The encoded rows.
            oracle: Mistral's own tokenization.
            dataset: The chat JSONL files that the rows come from, in order; empty if they are missing.
            base: The checkpoint folder, whose `config.json` states the use of positions; None for the tokenizer's
                folder.
            judges_texts: Whether to judge the texts and answers of the rows: not those of packaged rows, which are odd
                on purpose.
            trained: The rows that the model of an evaluation was trained on; empty if they are not known.
            cause: The chat template that rows may be encoded by; None if there is none.
            pad: The pad token by which labels may be masked; None if it is no EOS.
        """
        self.cause: TemplateCause | None = cause
        self.pad: PadCause | None = pad
        self.scaling: PositionScaling = PositionScaling.of_folder(base or oracle.path)
        self.rows = rows
        self.states: Counter[State] = Counter()
        self.counts: Counter[str] = Counter()
        self.tokens: int = 0
        self.supervised: int = 0
        self.packed: int = 0
        self.masked: int = 0
        self.columns: Counter[str] = Counter()
        self.read_back: int = 0
        self.without_labels: int = 0
        self.images: int = 0
        self.errors: list[RowError] = []
        self._oracle = oracle
        self._reader = LineReader(oracle, rows.path if isinstance(rows, FileRows) else None)
        self.source: SourceTracker = SourceTracker(dataset)
        self.sides: SideJudge = SideJudge(oracle)
        self._balance = AnswerBalance()
        self._evaluation = EvaluationJudge(trained)
        self._rules = RowRules(oracle) if judges_texts else None
        self._tally = DatasetTally()
        self._files: dict[tuple[NamedSource, str | int | None], int] = {}
        self._other_side: _ObservedSide | None = None
        self._unjudged_answers: dict[str, str] = {}
        self._gaps = 0
        self._conversations = 0
        self._has_labels = False
        self._is_scored_whole = False
        self._read_conversations = 0
        self._marked_conversations = 0
        self._first_marked: Finding | None = None

    def verdicts(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[LineVerdict]:
        """Yield a verdict for each line, and a last one for the file.

        Args:
            progress: Called with the number of bytes read since the last call.

        Raises:
            InputError: If the file, or one of the dataset, cannot be opened.
            RowsError: If a row of the dataset cannot be read.
        """
        for item in scan_lines(self.rows, progress, has_source=bool(self.source.paths)):
            if isinstance(item, RowError):
                self.source.unreadable += 1
                # a file of another format has an error in each of its lines: memory stays bounded
                if len(self.errors) < MOST_ERRORS:
                    self.errors.append(item)
                finding = Finding("ML501", item.found, item.place, item.expected, item.next_step)
                verdict = LineVerdict(None, item.place, "not judged", (finding,))
            else:
                verdict = self._take_line(item)
            self.states[verdict.state] += 1
            self.counts.update(finding.rule for finding in verdict.findings)
            yield verdict
        findings = list(self.source.missing_findings(self.rows.place))
        # The answers of missing rows are known only now.
        for row in self.source.missing_rows():
            self._add_expected(row, row.place)
        if self.states["not judged"] < self.states.total():  # else no answer was read, and no answer can be lost
            findings += self._balance.findings(self.rows.place, self._oracle)
        findings += self._evaluation.file_findings(self.rows.place)
        findings += self.sides.file_findings(self.rows.place)
        if self._first_marked is not None:
            findings.append(self._marked_finding(self._first_marked))
        for cause in (self.cause, self.pad):
            findings += cause.findings() if cause is not None else ()
        findings += self._of_all_rows()
        for finding in findings:
            self.counts[finding.rule] += finding.more or 1
        yield LineVerdict(None, self.rows.place, "wrong" if findings else "sound", tuple(findings))

    def _take_line(self, line: EncodedLine) -> LineVerdict:
        line = self.source.numbered(self._as_encoded(self.source.with_messages(line)))
        new = self.source.is_new(line)
        findings = self.source.take(line)
        asked = tuple(self._evaluation.findings(line))
        if asked and not line.rows:
            return LineVerdict(line.index, line.place, "wrong", asked)
        findings += asked
        shown = line.rows[0].to_jsonl() if line.rows else ""
        findings += (Finding(one.rule, one.found, line.place, one.expected, row=shown) for one in line.faults)
        self.masked += line.masked
        self.columns.update(() if line.error else line.columns)
        is_empty = line.side is not None and self.sides.is_empty(line.side)
        if line.side is not None:
            findings += self.sides.take(line, line.side)
            if is_empty and not line.rows:
                # no conversation can be read back from it
                return LineVerdict(line.index, line.place, "wrong", tuple(findings))
        if not (line.rows or line.error or self.source.paths):
            if not self._oracle.image_ids.isdisjoint(line.input_ids):
                self.images += 1
                return LineVerdict(line.index, line.place, "not judged", tuple(findings))
            read = self._reader.read(line)
            if read.findings and (explained := self._explained(line, read.findings)) is not None:
                return LineVerdict(line.index, line.place, "wrong", (*findings, *explained))
            findings += read.findings
            if not read.expected:
                return LineVerdict(line.index, line.place, "not judged", tuple(findings))
            self.read_back += 1
            self.without_labels += read.without_labels
            self.packed += read.line.packed
            self._note_markers(read.line.rows)
            return self._compare(read.line, read.expected, findings, new=new, origin="read back")
        self.packed += line.packed
        if line.error or not line.rows:
            # A source knows its answers better than a row that the trainer wrote beside its error.
            for row in () if self.source.paths else line.rows:
                self._add_expected(row, line.place)
            return LineVerdict(line.index, line.place, "not judged", tuple(findings))
        try:
            expected = [self._oracle.encode(row) for row in line.rows]
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
        comparison = EncodedLineComparison(line, expected, self._oracle, self.scaling)
        of_tokens = list(comparison.findings())
        if any(RULES[finding.rule].case == "ids" for finding in of_tokens):
            explained = self._explained(line, of_tokens)
            if explained is not None:
                return LineVerdict(line.index, line.place, "wrong", (*findings, *explained))
        restored = self.pad.restored(comparison) if self.pad is not None else None
        if restored is not None and self.pad is not None:
            without = list(restored.findings())
            self.pad.take(of_tokens, without)
            of_tokens = without
        self.tokens += len(comparison.padding.real)
        if line.side is None or line.side.has_labels:
            self._has_labels = True
            self.supervised += sum(label != IGNORE_INDEX for label in line.labels)
        else:
            self._is_scored_whole = True
        # The answers of a sound row are on both sides, and a row with another fault is reported for that fault.
        is_trained = line.few_shot is None
        if (
            is_trained
            and comparison.comparable
            and (not new or LOSES.intersection(finding.rule for finding in of_tokens))
        ):
            for encoded in expected if new else ():
                self._balance.add(encoded.input_ids, encoded.labels or (), self._oracle, line.place, 1)
            self._balance.add(comparison.ids, comparison.labels, self._oracle, line.place, -1)
        findings += of_tokens
        if not is_trained:
            self._unjudged_answers |= dict.fromkeys(
                ("answers", "decoding"), "the answers of an evaluation are not trained on"
            )
            return LineVerdict(line.index, line.place, "wrong" if findings else "sound", tuple(findings))
        is_wrong = bool(findings) or restored is not None
        whole = tuple(token for encoded in expected for token in encoded.input_ids)
        # what was read back is judged only if it gives the ids again: else the ids have a finding
        if origin == "written" or comparison.ids == whole:
            given = GivenIds(comparison.ids, comparison.labels)
            observed = self._observe(line, expected, origin, given, is_exact=not of_tokens)
            is_wrong |= any(finding.severity == "error" for finding in observed)
            findings += observed
        return LineVerdict(line.index, line.place, "wrong" if is_wrong else "sound", tuple(findings))

    def _observe(
        self, line: EncodedLine, expected: Sequence[EncodedRow], origin: Origin, given: GivenIds, *, is_exact: bool
    ) -> list[Finding]:
        """Show the conversations of a line to the rules on rows, and return their findings about these alone.

        Args:
            line: The line.
            expected: mistral-common's encoding of each conversation.
            origin: Where the messages come from.
            given: The ids and labels of the line, without padding.
            is_exact: Whether ids and labels are mistral-common's: else the answers are not decoded.
        """
        if self._rules is None:
            return []
        found: list[Finding] = []
        tally = self._tally
        file = self._files.setdefault((line.place.source, line.place.split), len(self._files))
        for row, encoded in zip(line.rows, expected, strict=True):
            if not row.messages:
                continue  # a conversation that cannot be read back
            is_gap = isinstance(row, FimRow)
            self._gaps += is_gap
            self._conversations += not is_gap
            tally.look_at(file, line.place.row)
            caught: list[Finding] = []
            tally.findings.caught = caught
            if line.chosen is None:
                self._rules.begin_record()
                tally.counts[file, "judged"] += 1
            self._rules.observe_row(row, encoded, encoded if is_exact else None, tally, origin=origin)
            self._observe_record(_ObservedSide(line, row, encoded), origin, given, is_exact=is_exact)
            tally.findings.caught = None
            shown = row.to_jsonl() if caught else ""
            found += (replace(finding, row=finding.row or shown) for finding in caught if finding.rule not in _BY_IDS)
        return found

    def _observe_record(self, side: _ObservedSide, origin: Origin, given: GivenIds, *, is_exact: bool) -> None:
        """Show a record to the rules: of a pair, when its second side has come."""
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
        )
        self._rules.observe_record(record, self._tally)

    def _of_all_rows(self) -> Iterator[Finding]:
        """Yield what only all rows together show of their texts, answers and repeats."""
        if self._rules is None:
            return
        files = [Place(source, split=split) for source, split in self._files]
        self._tally = self._tally.ordered()
        note_files(self._tally, files, is_sample=self.rows.is_sample)
        kinds = {NOT_READ_BACK: "answers", NOT_BY_GRAMMAR: "decoding"}
        for kind, reason in self._tally.named:
            # a grammar that judges some of the rows has judged something
            is_partly = kind == NOT_BY_GRAMMAR and self._tally.named[BY_GRAMMAR, ""]
            if kind in kinds and not is_partly:
                self._unjudged_answers.setdefault(kinds[kind], reason)
        for rule in self._tally.findings.rules:
            if rule not in _BY_IDS:
                yield from self._tally.findings.of(rule)

    def _explained(self, line: EncodedLine, before: Sequence[Finding]) -> list[Finding] | None:
        """Return the findings of a line that the chat template does not explain; None if the line is not encoded by it.

        Args:
            line: The line.
            before: Its findings by mistral-common's encoding.
        """
        found = None if self.cause is None else self.cause.encode(line, self._oracle)
        if found is None or self.cause is None:
            return None
        line, encoded = found
        comparison = EncodedLineComparison(line, encoded, self._oracle, self.scaling)
        after = list(comparison.findings())
        self.cause.take(before, after)
        self.read_back += not self.source.paths and before[0].rule in _UNREAD
        self.tokens += len(comparison.padding.real)
        if line.side is None or line.side.has_labels:
            self._has_labels = True
            self.supervised += sum(label != IGNORE_INDEX for label in line.labels)
        return after

    def _note_markers(self, rows: Sequence[Row]) -> None:
        """Count the conversations that were read back and are marked up for another family.

        With messages, such markers are the row's own, or the comparison shows that a template wrote them.
        """
        for row in rows:
            # markers are at home in code; a row that cannot be read back has no messages, and a finding of its own
            if isinstance(row, FimRow) or not row.messages:
                continue
            self._read_conversations += 1
            if marked := markup_of(row):
                index, marker, is_asked_for = marked
                self._marked_conversations += 1
                if not is_asked_for:
                    place, found = row.place / "messages" / index / "content", f"the text is marked up with {marker}"
                    self._first_marked = self._first_marked or Finding("ML584", found, place, row=row.to_jsonl())

    def _marked_finding(self, first: Finding) -> Finding:
        count, read = self._marked_conversations, self._read_conversations
        found = f"{first.found}, as {count:,} of {counted(read, 'conversation')} are"
        # a template marks up every row; a few rows may have it of their source
        return replace(first, found=found, severity="error" if count == read > 1 else first.severity)

    def _as_encoded(self, line: EncodedLine) -> EncodedLine:
        """Return a row of a table with the nulls that the table gave its calls and tools, if its ids have them, too."""
        with suppress(OracleRejection):
            for rows in filter(None, (line.as_stored and line.rows, line.as_stored)):
                if _hold(line.input_ids, [self._oracle.encode(row) for row in rows]):
                    return replace(line, rows=rows)
        return line

    def _add_expected(self, row: Row, place: Place) -> None:
        try:
            encoded = self._oracle.encode(row)
        except OracleRejection:
            return  # a row that mistral-common refuses has no answers to train on
        self._balance.add(encoded.input_ids, encoded.labels or (), self._oracle, place, 1)

    def raise_unreadable(self) -> None:
        """Raise an error for unreadable lines, if any.

        Raises:
            RowsError: If lines could not be read.
        """
        if not self.errors:
            return
        more = self.counts["ML501"] - len(self.errors)
        rest = [RowError(f"{more} more lines cannot be read", place=self.rows.place)] if more else []
        raise RowsError([*self.errors, *rest], place=self.rows.place)

    @property
    def not_checked(self) -> dict[str, str]:
        """The reason of each check without findings that had nothing to judge, by its name in `CASES`."""
        reasons = {}
        if self.judged == 0:
            has_images = 0 < self.images == self.states.total()
            reasons = dict.fromkeys(OF_ROWS, _IMAGES_ALONE if has_images else NOTHING_JUDGED)
        elif not self.source.is_known:
            reasons = {"rows-complete": "no rows are given to compare with: mistral-lora audit --dataset ROWS"}
        if self._gaps and not self._conversations:
            reason = "no sound row is a conversation: they are fill-in-the-middle"
            reasons |= dict.fromkeys(("answers", "decoding"), reason)
        if self._is_scored_whole and not self._has_labels:
            reasons.setdefault("labels", SCORED_WHOLE)
        for case, reason in self._unjudged_answers.items():
            reasons.setdefault(case, reason)
        if self._rules is None or not (self._conversations or self._gaps):
            reasons = dict.fromkeys(OF_CHAT_ROWS, _NO_ROW) | reasons
        if self.states.total() == self.counts["ML501"]:
            reasons = dict.fromkeys(CASES, "no line of the file can be read: see the check `file`") | reasons
        if self.cause is not None and self.cause.counts and self.cause.finding is not None:
            reason = f"rows are encoded by a chat template that is not mistral-common's: see {self.cause.finding.rule}"
            reasons |= dict.fromkeys(("supervised-text", "answers", "decoding", *OF_CHAT_ROWS), reason)
        found = {case_of(rule) for rule, count in self.counts.items() if count}
        return {case: why for case, why in reasons.items() if case not in found}

    @property
    def explained(self) -> str:
        """Why wrong rows may have no finding: the rules of the file that cover theirs; empty if none does."""
        rules = [cause.finding.rule for cause in (self.cause, self.pad) if cause and cause.counts and cause.finding]
        return f"its faults are explained by a finding about all rows: see {', '.join(rules)}" if rules else ""

    @property
    def judged(self) -> int:
        """The number of judged rows."""
        return self.states["sound"] + self.states["wrong"]

    @property
    def rows_line(self) -> str:
        """The number of rows and of judged rows, in words for a summary."""
        masks = f"; the labels of {self.masked:,} are made of a mask, as TRL makes them" if self.masked else ""
        if self.columns.keys() - {"labels"}:
            masks += f"; what is trained on: {', '.join(f'{key} ({n:,})' for key, n in sorted(self.columns.items()))}"
        read = f"; {self.read_back:,} without messages, read back from their ids" if self.read_back else ""
        weights = f"; {counted(self.without_labels, 'answer')} in them without a label" if self.without_labels else ""
        sides = f"; {self.sides.words}" if self.sides.words else ""
        sides += f"; not checked: images in {counted(self.images, 'row')} without messages" if self.images else ""
        return f"{counted(self.states.total(), 'row')}, {self.judged:,} judged{masks}{read}{weights}{sides}"

    def summary(self) -> dict[str, Any]:
        """Return the figures of a finished audit, as plain JSON data."""
        counts = sorted(self.counts.items())
        classes = [{"rule": rule, "class": RULES[rule].fault_class, "count": count} for rule, count in counts]
        return {
            "rows": self.states.total(),
            "sound": self.states["sound"],
            "wrong": self.states["wrong"],
            "not_judged": self.states["not judged"],
            "not_checked": self.not_checked,
            "packed": self.packed,
            "labels_of_masks": self.masked,
            "columns": dict(sorted(self.columns.items())),
            "read_back": self.read_back,
            "answers_without_labels": self.without_labels,
            "pairs": self.sides.pairs,
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "findings": self.counts.total(),
            "classes": classes,
        }


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


def file_findings(rows: RowSource, oracle: Oracle) -> Iterator[Finding]:
    """Yield the findings of encoded rows: of every row, and of all together.

    Raises:
        RowsError: After the last finding, if lines are not encoded rows.
        InputError: If they cannot be read.
    """
    audit = Audit(rows, oracle)
    for verdict in audit.verdicts():
        yield from (finding for finding in verdict.findings if finding.rule != "ML501")
    audit.raise_unreadable()


@dataclass
class AuditReport:
    """An audit, and its findings in bounded memory once it has run.

    Attributes:
        audit: The audit.
        most: Most findings of a rule to keep; more are counted.
        kept: The first findings of each rule.
    """

    audit: Audit
    most: int = KEPT
    kept: dict[str, list[Finding]] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        rows: RowSource,
        oracle: Oracle,
        dataset: tuple[Path, ...] = (),
        *,
        base: Path | None = None,
        cause: TemplateCause | None = None,
        pad: PadCause | None = None,
    ) -> AuditReport:
        """Audit a file.

        Raises:
            InputError: If the file cannot be opened.
        """
        report = cls(Audit(rows, oracle, dataset, base=base, cause=cause, pad=pad))
        for _ in report.verdicts():
            pass
        return report

    def verdicts(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[LineVerdict]:
        """Yield the verdicts of the audit, and keep their findings.

        Args:
            progress: As for `Audit.verdicts`.

        Raises:
            InputError: As for `Audit.verdicts`.
        """
        for verdict in self.audit.verdicts(progress):
            for finding in verdict.findings:
                kept = self.kept.setdefault(finding.rule, [])
                if len(kept) < self.most:
                    kept.append(finding)
            yield verdict

    def findings_of(self, rule: str) -> Iterator[Finding]:
        """Yield the kept findings of a rule, and a finding that counts the others."""
        kept = self.kept.get(rule, [])
        yield from kept
        more = self.audit.counts[rule] - sum(finding.more or 1 for finding in kept)
        if more > 0:
            yield rest_of_findings(rule, more, self.audit.rows.place)


@dataclass(frozen=True)
class AuditedTarget(EncodedTarget):
    """Encoded rows with an audit by a caller's settings.

    Attributes:
        audited: Runs the audit, and returns its report.
    """

    audited: Callable[[], AuditReport] | None = None


def checks(target: EncodedTarget, settings: Settings) -> Iterator[Check]:
    """Yield the checks of an encoded-rows file; the first check that runs reads the file for all."""

    @cache
    def audited() -> AuditReport:
        if isinstance(target, AuditedTarget) and target.audited is not None:
            return target.audited()
        return AuditReport.read(
            target.rows,
            target.oracle,
            target.dataset,
            base=target.tokenizer.path,
            cause=cause_of(target.judge),
            pad=pad_cause_of(target.judge),
        )

    for case in CASES:
        yield Check(target, "encoded", case, partial(_run_check, audited, case, target.fixes))


def rules_of(case: str) -> list[str]:
    """Return the rules that a check of `CASES` reports."""
    # the cause in front
    of_chat_rows = _BY_CHAT_CASE.get(case, case if case in OF_CHAT_ROWS else "")
    return [
        *([CAUSES[case]] if case in CAUSES else ()),
        *(rule.id for rule in RULES.of("encoded", case)),
        *(rule.id for rule in (RULES.of("dataset", of_chat_rows) if of_chat_rows else ())),
    ]


@cache
def case_of(rule: str) -> str:
    """Return the check of `CASES` that reports a rule."""
    return next(case for case in CASES if rule in rules_of(case))


def _run_check(audited: Callable[[], AuditReport], case: str, fixes: Mapping[str, str]) -> Result:
    report = audited()
    findings = in_words((finding for rule in rules_of(case) for finding in report.findings_of(rule)), fixes)
    if reason := report.audit.not_checked.get(case, ""):
        return Result(not_checked=reason)
    facts: dict[str, Any] = {
        "rows": report.audit.states.total(),
        "judged": report.audit.judged,
        "wrong": report.audit.states["wrong"],
        "packed": report.audit.packed,
        "encoded rows of": report.audit.rows_line,
    }
    if case == "packing":
        facts["positions"] = report.audit.scaling.key or report.audit.scaling.source
    return Result(findings, facts=tuple(facts.items()))
