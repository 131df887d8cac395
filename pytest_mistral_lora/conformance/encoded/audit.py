"""One pass over an encoded-rows file: a verdict on each line and on the file, and the subject's checks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import Declaration
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading.chunks import CHUNK_BYTES, CHUNK_LINES, DataFile, in_order, processes_for
from pytest_mistral_lora.chat.reading.row_source import RowSource, SourceRecord
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizer_folder import TokenizerFiles
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.dataset.cases import OF_ENCODED_ROWS
from pytest_mistral_lora.conformance.dataset.decoded_answers import decoded_answers
from pytest_mistral_lora.conformance.encoded.agreement import Agreement
from pytest_mistral_lora.conformance.encoded.audit_state import AuditState
from pytest_mistral_lora.conformance.encoded.evaluation import EvaluationJudge
from pytest_mistral_lora.conformance.encoded.file_faults import SourceTracker
from pytest_mistral_lora.conformance.encoded.line_judge import (
    MOST_ERRORS,
    AuditPart,
    LineJudge,
    LineVerdict,
    RecordPart,
    State,
)
from pytest_mistral_lora.conformance.encoded.line_labels import candidates
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, TakenLine, scan_lines
from pytest_mistral_lora.conformance.encoded.packing import PositionScaling
from pytest_mistral_lora.conformance.encoded.pad_cause import PadCause, pad_cause_of
from pytest_mistral_lora.conformance.encoded.template_cause import Cause, ExplainedFindings, TemplateCause, cause_of
from pytest_mistral_lora.conformance.finding import (
    RULES,
    Finding,
    Result,
    rest_of_findings,
)
from pytest_mistral_lora.conformance.targets import EncodedTarget, Target
from pytest_mistral_lora.errors import InputError, RowError, RowsError, counted
from pytest_mistral_lora.formats.files import every_file
from pytest_mistral_lora.formats.report import conversion_words
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.places import NamedSource, Place

KEPT = 20
"""Most findings of a rule to keep; more are counted."""

OF_CHAT_ROWS = tuple(case for case, name in OF_ENCODED_ROWS.items() if case == name)
"""Checks of the conversations that have the name that they have for chat rows."""
_OF_ROWS = ("ids", "labels", "packing", "supervised-text", "answers", "decoding", *OF_CHAT_ROWS)
"""Checks that would pass on nothing if no row can be judged."""
CASES = ("file", "rows-complete", *_OF_ROWS)
"""Every check of the subject: a rule names its check in `rules/encoded.toml` or `rules/dataset.toml`."""
NOTHING_JUDGED = "no row of the file can be judged"
_NOT_TRAINED_ON = "the answers of an evaluation are not trained on"
SCORED_WHOLE = "a reward model scores conversations as a whole: no token has a label"

_NO_ROW = "no conversation of the file can be judged"


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """The settings for judging records, in a form that crosses process boundaries.

    Attributes:
        tokenizer: The tokenizer file or checkpoint folder.
        oracle_name: The declared oracle of a folder without a Mistral tokenizer file, or None.
        scaling: The model's use of positions.
        path: The file or folder of the rows.
        judges_texts: As for `Audit`.
        has_cause: Whether rows may be encoded by the chat template of the folder.
        has_pad: Whether labels may be masked by its pad token.
        declared: As for `Audit`.
    """

    tokenizer: Path
    oracle_name: str | None
    scaling: PositionScaling
    path: Path
    judges_texts: bool
    has_cause: bool
    has_pad: bool
    declared: Declaration | None

    def prepare(self) -> Callable[[RecordPart], AuditPart]:
        """Return the judge of records."""
        judge = Target.of_loaded(CheckpointTokenizer(self.tokenizer, self.oracle_name))
        return LineJudge(
            judge.oracle,
            self.scaling,
            path=self.path,
            judges_texts=self.judges_texts,
            cause=cause_of(judge) if self.has_cause else None,
            pad=pad_cause_of(judge) if self.has_pad else None,
            declared=self.declared,
        ).judge


class Audit:
    """The audit of a file, to be run once: its records are judged in parts, perhaps by several processes.

    Attributes:
        rows: The encoded rows.
        counts: Findings by rule.
        errors: Lines that cannot be read, the first thousand.
        scaling: The model's use of positions.
        source: The rows of the source that the file has had so far.
        cause: The chat template that rows may be encoded by; None if there is none.
        pad: The pad token by which labels may be masked; None if it is no EOS.
        states: Number of rows that are sound, wrong, and not judged: the order of the lines may make a row wrong.
        totals: What the lines that were judged so far add up to.
        agreement: The objective that nobody declares and all lines agree on so far.
    """

    def __init__(
        self,
        rows: RowSource,
        oracle: Oracle,
        dataset: tuple[Path, ...] = (),
        *,
        base: TokenizerFiles | None = None,
        judges_texts: bool = True,
        trained: Sequence[Row] = (),
        cause: TemplateCause | None = None,
        pad: PadCause | None = None,
        tokenizer: CheckpointTokenizer | None = None,
        processes: int | None = None,
        declared: Declaration | None = None,
    ) -> None:
        """Prepare the audit.

        Args:
            rows: The encoded rows.
            oracle: Mistral's own tokenization.
            dataset: The chat JSONL files that the rows come from, in order; empty if they are missing.
            base: The files of the checkpoint, whose `config.json` states the use of positions; None for those of the
                tokenizer.
            judges_texts: Whether to judge the texts and answers of the rows: not those of packaged rows, which are odd
                on purpose.
            trained: The rows that the model of an evaluation was trained on; empty if they are not known.
            cause: The chat template that rows may be encoded by; None if there is none.
            pad: The pad token by which labels may be masked; None if it is no EOS.
            tokenizer: The tokenizer, if other processes may load it; None to judge in this process alone.
            processes: Number of processes that judge; None for one if the file is short, else one for each CPU.
            declared: The declared objective; None if none is declared.
        """
        self.agreement: Agreement = Agreement(candidates(oracle) if declared is None else frozenset())
        self._declared = declared
        self.states: Counter[State] = Counter()
        self.totals: AuditState = AuditState()
        self.cause: TemplateCause | None = cause
        self.pad: PadCause | None = pad
        self.scaling: PositionScaling = PositionScaling.of_files(base or TokenizerFiles(oracle.path))
        self.rows = rows
        self.counts: Counter[str] = Counter()
        self.errors: list[RowError] = []
        self.source: SourceTracker = SourceTracker(dataset)
        self._oracle = oracle
        self._tokenizer = tokenizer
        self._processes = processes
        self._evaluation = EvaluationJudge(trained)
        self._judges_texts = judges_texts
        self._files: dict[tuple[NamedSource, str | int | None], int] = {}
        # the number of each line whose row came before, with its place
        self._again: dict[int, Place] = {}
        self._judge = LineJudge(
            oracle,
            self.scaling,
            path=self._path,
            judges_texts=judges_texts,
            evaluation=self._evaluation,
            cause=cause,
            pad=pad,
            declared=declared,
        )

    @property
    def _path(self) -> Path | None:
        return self.rows.path if isinstance(self.rows, FileRows) else None

    def verdicts(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[LineVerdict]:
        """Yield a verdict for each line, and a last one for the file.

        Args:
            progress: Called with the number of bytes read since the last call.

        Raises:
            InputError: If the file, or one of the dataset, cannot be opened.
            RowsError: If a row of the dataset cannot be read.
        """
        lines, totals = 0, self.totals
        for part in self._parts(progress):
            taken = iter(part.taken)
            for verdict in part.verdicts:
                # a line that cannot be read has no number; a dataset has seen the others
                if verdict.index is not None and not self.source.paths:
                    verdict = self._in_order(verdict, next(taken), lines)
                lines += 1
                yield from map(self._counted, self.agreement.take(verdict))
            self._take(part)
        yield from map(self._counted, self.agreement.end())
        findings = self._findings_of_agreement()
        findings += self.source.missing_findings(self.rows.place)
        # The answers of missing rows are known only now.
        for row in self.source.missing_rows():
            self._judge.expected_answers(row, row.place, 1, totals.balance)
        self._correct_repeated()
        # else no answer was read, and no answer can be lost
        is_counted = self.judges_labels and self._judge.counts_texts
        if is_counted and self.states["not judged"] < self.states.total():
            findings += totals.balance.findings(self.rows.place, self._oracle)
        findings += self._evaluation.file_findings(totals.prompts)
        for cause, explained in self._causes():
            findings += cause.findings(explained)
        findings += self._of_all_rows()
        for finding in findings:
            self.counts[finding.rule] += finding.more or 1
        yield LineVerdict(None, self.rows.place, "wrong" if findings else "sound", tuple(findings))

    @property
    def judges_labels(self) -> bool:
        """Whether labels are judged: not if no word expresses the declared objective."""
        return self._declared is None or self._declared.objective is not None

    def _counted(self, verdict: LineVerdict) -> LineVerdict:
        self.states[verdict.state] += 1
        self.counts.update(finding.rule for finding in verdict.findings)
        return verdict

    def _findings_of_agreement(self) -> list[Finding]:
        """Return the finding of an objective that all lines agree on, by which the rest is judged."""
        if self.agreement.found is None:
            self.totals.balance.extend(self.totals.following)
        else:
            self._judge.use(self.agreement.found)
        return list(self.agreement.findings(self.rows.place))

    def _in_order(self, verdict: LineVerdict, taken: TakenLine, line: int) -> LineVerdict:
        """Return a verdict with the findings about the order of the lines."""
        if not self.source.is_new_number(taken.index, is_second=taken.is_second):
            self._again[line] = taken.place.row
        findings = self.source.take_in_order(taken)
        if not findings or any(finding.rule == "ML580" for finding in verdict.findings):
            return verdict  # a prompt that is a text is why its row was dropped
        state = "wrong" if verdict.state == "sound" else verdict.state
        return replace(verdict, state=state, findings=(*findings, *verdict.findings))

    def _take(self, part: AuditPart) -> None:
        """Add what the lines of a part add up to."""
        self.source.unreadable += len(part.unreadable) + part.state.rows.unchecked.counts.total()
        # a file of another format has an error in each of its lines: memory stays bounded
        self.errors += part.unreadable[: MOST_ERRORS - len(self.errors)]
        self.totals.extend(part.state)

    def _causes(self) -> Iterator[tuple[Cause, ExplainedFindings]]:
        """Yield the causes of the file, each with the findings that it explains."""
        for cause, explained in ((self.cause, self.totals.by_template), (self.pad, self.totals.by_pad)):
            if cause is not None:
                yield cause, explained

    def _parts(self, progress: Callable[[int], None]) -> Iterator[AuditPart]:
        """Yield the verdicts on the parts of the rows, in order."""
        records = self._records(progress)
        if self.source.paths:
            # the dataset is read beside the lines, in order
            yield from (self._judge.judge(part, self.source) for part in records)
            return
        processes = self._processes if self._processes is not None else self._processes_for_file()
        if self._tokenizer is None or self._path is None or processes <= 1:
            yield from map(self._judge.judge, records)
            return
        plan = AuditPlan(
            self._tokenizer.path,
            self._tokenizer.declared,
            self.scaling,
            self._path,
            self._judges_texts,
            self.cause is not None,
            self.pad is not None,
            self._declared,
        )
        yield from (part for part, _ in in_order(AuditPlan.prepare, plan, records, processes, self._judge.judge))

    def _processes_for_file(self) -> int:
        if self._path is None or self._tokenizer is None:
            return 1
        with suppress(InputError):  # reading it reports the error
            return processes_for([DataFile(file) for file in every_file(self._path)])
        return 1

    def _records(self, progress: Callable[[int], None]) -> Iterator[RecordPart]:
        """Yield the records in parts."""
        number = size = 0
        read = 0

        def count(more: int) -> None:
            nonlocal read
            read += more
            progress(more)

        records: list[SourceRecord] = []
        for record in self.rows.records(count):
            self._files.setdefault((record.place.source, record.place.split), len(self._files))
            records.append(record)
            if len(records) >= CHUNK_LINES or read - size >= CHUNK_BYTES:
                yield RecordPart(number, records, dict(self._files), read - size)
                number, size, records = number + len(records), read, []
        if records:
            yield RecordPart(number, records, dict(self._files), read - size)
        elif not number:
            found = "there are no rows" if self.rows.place.source.is_value else "the file has no rows"
            yield RecordPart(0, [SourceRecord(self.rows.place, RowError(found, place=self.rows.place))], {}, 0)

    def _correct_repeated(self) -> None:
        """Take the answers of lines back whose number came before: they were counted as those of a new row."""
        if not self._again or not self.rows.is_repeatable:
            return
        for number, line in enumerate(scan_lines(self.rows)):
            if number in self._again and isinstance(line, EncodedLine):
                self._judge.take_again(line, self.totals.balance)

    def _of_all_rows(self) -> Iterator[Finding]:
        """Yield what only all rows together show of their texts, answers and repeats."""
        if not self._judges_texts:
            return
        rows = self.totals.rows
        rows.put_in_order()
        rows.report([Place(source, split=split) for source, split in self._files], is_sample=self.rows.is_sample)
        again = set(self._again.values())
        for rule in rows.findings.rules:
            # the last answer alone is an objective that all lines agree on
            if rule == "ML662" and self.agreement.found is not None:
                continue
            for finding in rows.findings.of(rule):
                # a line that comes again is known by its number
                if rule != "ML608" or finding.place.row not in again:
                    yield finding

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
        reasons, figures = dict[str, str](), self.totals.figures
        if self.judged == 0:
            reasons = dict.fromkeys(_OF_ROWS, NOTHING_JUDGED)
        if not self.source.is_known:
            reasons["rows-complete"] = "no rows are given to compare with: mistral-lora check --dataset ROWS"
        if figures.other_kinds and not figures.conversations:
            reason = f"no sound row is a conversation: each is {' or '.join(sorted(figures.other_kinds))}"
            reasons |= dict.fromkeys(("answers", "decoding"), reason)
        if figures.is_scored_whole and not figures.has_labels:
            reasons.setdefault("labels", SCORED_WHOLE)
        if not self._judge.counts_texts:
            reasons["supervised-text"] = f"{self._declared or self.agreement.found}: parts of answers are not counted"
        if not self.judges_labels:
            reasons |= dict.fromkeys(("labels", "supervised-text"), str(self._declared))
        answers = decoded_answers(self.totals.rows.states)
        unjudged = {"answers": answers.not_read_back.reason, "decoding": answers.why_not_by_grammar}
        if figures.asks:
            unjudged = dict.fromkeys(unjudged, _NOT_TRAINED_ON)
        for case, reason in unjudged.items():
            if reason:
                reasons.setdefault(case, reason)
        if not self._judges_texts or not (figures.conversations or figures.other_kinds):
            reasons = dict.fromkeys(OF_CHAT_ROWS, _NO_ROW) | reasons
        if self.states.total() == self.counts["ML501"]:
            reasons = dict.fromkeys(CASES, "no line of the file can be read: see the check `file`") | reasons
        if self.cause is not None and self.totals.by_template.counts and self.cause.finding is not None:
            reason = f"rows are encoded by a chat template that is not mistral-common's: see {self.cause.finding.rule}"
            reasons |= dict.fromkeys(("supervised-text", "answers", "decoding", *OF_CHAT_ROWS), reason)
        found = {case_of(rule) for rule, count in self.counts.items() if count}
        reasons = {case: why for case, why in reasons.items() if case not in found}
        # a finding about other rows judges none of these
        return reasons | ({"file": unchecked} if (unchecked := self.totals.rows.unchecked.words) else {})

    @property
    def explained(self) -> str:
        """Why wrong rows may have no finding: the rules of the file that cover theirs; empty if none does."""
        rules = [cause.finding.rule for cause, explained in self._causes() if explained.counts and cause.finding]
        rules += ["ML508"] if self.agreement.found is not None else []
        return f"its faults are explained by a finding about all rows: see {', '.join(rules)}" if rules else ""

    @property
    def judged(self) -> int:
        """The number of judged rows."""
        return self.states["sound"] + self.states["wrong"]

    @property
    def rows_line(self) -> str:
        """The number of rows and of judged rows, in words for a summary."""
        figures, sides = self.totals.figures, self.totals.sides.words
        more = f"{figures.words}; {sides}" if sides else figures.words
        converted = conversion_words(self.totals.rows.converted.counts, self.totals.rows.converted.first_place)
        more += f"; converted as by import: {converted}" if converted else ""
        more += f"; not checked: {unchecked}" if (unchecked := self.totals.rows.unchecked.words) else ""
        return f"{counted(self.states.total(), 'row')}, {self.judged:,} judged{more}"

    def summary(self) -> dict[str, Any]:
        """Return the figures of a finished audit, as plain JSON data."""
        counts, figures = sorted(self.counts.items()), self.totals.figures
        classes = [{"rule": rule, "class": RULES[rule].fault_class, "count": count} for rule, count in counts]
        return {
            "rows": self.states.total(),
            "sound": self.states["sound"],
            "wrong": self.states["wrong"],
            "not_judged": self.states["not judged"],
            "not_checked": self.not_checked,
            "packed": figures.packed,
            "labels_of_masks": figures.masked,
            "columns": dict(sorted(figures.columns.items())),
            "read_back": figures.read_back,
            "answers_without_labels": figures.without_labels,
            "pairs": self.totals.sides.pairs,
            "tokens": figures.tokens,
            "supervised_tokens": figures.supervised,
            "findings": self.counts.total(),
            "classes": classes,
        }


def file_findings(rows: RowSource, oracle: Oracle, declared: Declaration | None = None) -> Iterator[Finding]:
    """Yield the findings of encoded rows: of every row, and of all together.

    Args:
        rows: The rows.
        oracle: Mistral's own tokenization.
        declared: As for `Audit`.

    Raises:
        RowsError: After the last finding, if lines are not encoded rows.
        InputError: If they cannot be read.
    """
    audit = Audit(rows, oracle, declared=declared)
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
        base: TokenizerFiles | None = None,
        cause: TemplateCause | None = None,
        pad: PadCause | None = None,
        tokenizer: CheckpointTokenizer | None = None,
        declared: Declaration | None = None,
    ) -> AuditReport:
        """Audit a file.

        Raises:
            InputError: If the file cannot be opened.
        """
        audit = Audit(rows, oracle, dataset, base=base, cause=cause, pad=pad, tokenizer=tokenizer, declared=declared)
        report = cls(audit)
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
            base=target.tokenizer.files,
            cause=cause_of(target.judge),
            pad=pad_cause_of(target.judge),
            tokenizer=target.tokenizer if target.tokenizer.is_on_disk else None,
            declared=target.objective,
        )

    for case in CASES:
        yield Check(target, "encoded", case, partial(_run_check, audited, case))


def rules_of(case: str) -> list[str]:
    """Return the rules that a check of `CASES` reports."""
    of_chat_rows = [name for name, of_ids in OF_ENCODED_ROWS.items() if of_ids == case]
    return [
        *(cause.rule for cause in (TemplateCause, PadCause) if cause.case == case),  # the cause in front
        *(rule.id for rule in RULES.of("encoded", case)),
        *(rule.id for name in of_chat_rows for rule in RULES.of("dataset", name)),
    ]


@cache
def case_of(rule: str) -> str:
    """Return the check of `CASES` that reports a rule."""
    return next(case for case in CASES if rule in rules_of(case))


def _run_check(audited: Callable[[], AuditReport], case: str) -> Result:
    report = audited()
    findings = tuple(finding for rule in rules_of(case) for finding in report.findings_of(rule))
    if reason := report.audit.not_checked.get(case, ""):
        return Result(findings, not_checked=reason)
    facts: dict[str, Any] = {
        "rows": report.audit.states.total(),
        "judged": report.audit.judged,
        "wrong": report.audit.states["wrong"],
        "packed": report.audit.totals.figures.packed,
        "encoded rows of": report.audit.rows_line,
    }
    if case == "packing":
        facts["positions"] = report.audit.scaling.key or report.audit.scaling.source
        facts["positions_run_on"] = report.audit.totals.figures.run_on
    if case == "decoding":
        facts |= decoded_answers(report.audit.totals.rows.states).figures
    return Result(findings, facts=tuple(facts.items()))
