"""One row of a dataset at a time: encoded as the trainer does, judged, and added to a pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from pytest_mistral_lora.chat.diff import TokenDiff, with_shape
from pytest_mistral_lora.chat.encoded import EncodedRow, Policy
from pytest_mistral_lora.chat.kinds.records import trained_row
from pytest_mistral_lora.chat.reading import read_line
from pytest_mistral_lora.chat.reading.chunks import Chunk
from pytest_mistral_lora.chat.row_files import record_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.deviations import Deviations
from pytest_mistral_lora.conformance.dataset.lengths import Lengths
from pytest_mistral_lora.conformance.dataset.observers import RowRules
from pytest_mistral_lora.conformance.dataset.pairs import empty_side
from pytest_mistral_lora.conformance.dataset.prompts import PromptRows
from pytest_mistral_lora.conformance.dataset.row_findings import (
    backend_findings,
    beyond,
    changes,
    column_finding,
    fault_finding,
    law_findings,
    printed_row,
)
from pytest_mistral_lora.conformance.finding import Finding, shown_difference
from pytest_mistral_lora.conformance.row_pass import JudgedRecord, RowPass
from pytest_mistral_lora.conformance.row_table import unpacked_place
from pytest_mistral_lora.errors import InputError, NoOracleError, OracleRejection, RowError, UncheckedRowError
from pytest_mistral_lora.formats.declared_keys import declared_values
from pytest_mistral_lora.formats.recognition import unread_columns
from pytest_mistral_lora.formats.tool_calls import ResultIdError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import is_held_out

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.reading.chunks import DataFile
    from pytest_mistral_lora.training.rows.judgement import Take

_NAMES = ("mistral-common", "chat template")
_PROMPT_SHARE = 24
"""One token of prompts is compared for so many tokens of rows, so that a pass takes hardly longer."""
_PROMPTS_IN_ANY_CASE = 8_000
"""Tokens of prompts that are compared in any case: these take a small part of the time of the start."""


@dataclass(frozen=True, slots=True)
class ScanPlan:
    """The settings for judging rows, in a form that crosses process boundaries.

    Attributes:
        tokenizer: The tokenizer file or checkpoint folder.
        backend: `mistral-common` or `chat-template`.
        policy: The recipe's policy for rows that cannot be trained on unchanged.
        held_out: Fraction of the training rows that is held out.
        compares: Whether there is a chat template to compare mistral-common with.
        official: Whether that template is mistral-common's own, and needs no bounds.
        oracle_name: The declared oracle of a folder without a Mistral tokenizer file, or None.
        sketches: Whether to make the sketches by which near rows are found.
        alone: Whether the rows are judged without a recipe; then it is unknown which columns are trained on.
    """

    tokenizer: Path
    backend: str
    policy: Policy
    held_out: float
    compares: bool
    official: bool = False
    oracle_name: str | None = None
    sketches: bool = False
    alone: bool = False

    def judge(self, tokenizer: CheckpointTokenizer) -> Callable[..., DatasetPass]:
        """Return `RowJudge.judge_chunk` of this plan."""
        return RowJudge(self, tokenizer).judge_chunk


_ByTemplate = EncodedRow | RowError | tuple[int, ...] | None


class _Record(NamedTuple):
    """The rows of a record, and mistral-common's encoding of each or its reason to refuse it.

    Attributes:
        place: Its place.
        rows: The rows; empty if it cannot be read.
        expected: The encoding of each row, or the error; None without a Mistral tokenizer.
        error: Why it cannot be read.
        columns: Its columns that another trainer may train on.
        declared: What its keys of `DECLARED_KEYS` have.
    """

    place: Place
    rows: tuple[Row, ...]
    expected: tuple[EncodedRow | RowError | None, ...]
    error: RowError | None = None
    columns: tuple[str, ...] = ()
    declared: tuple[tuple[str, Any], ...] = ()


@dataclass
class DatasetPass(RowPass):
    """What a pass over chat rows has found: beside what every pass has, what a recipe and a template make of them.

    `counts` has the `judged` and the `refused` records of each file, those that the recipe's policies have `dropped`,
    and the judged `conversations`.

    Attributes:
        lengths: The lengths of rows before the policies.
        deviations: The named deviations of the chat template.
        other_kinds: The judged records that are no conversations, by their kind in words.
        prompts: The rows whose prompts are compared with the template, once all rows are known.
    """

    lengths: Lengths = field(default_factory=Lengths)
    deviations: Deviations = field(default_factory=Deviations)
    other_kinds: Counter[str] = field(default_factory=Counter)
    prompts: PromptRows = field(default_factory=PromptRows)

    def extend(self, other: RowPass) -> None:
        """Add the rows, counts and findings of another part of the files."""
        super().extend(other)
        if isinstance(other, DatasetPass):
            self.lengths.extend(other.lengths)
            self.deviations.extend(other.deviations)
            self.other_kinds.update(other.other_kinds)
            self.prompts.extend(other.prompts)

    def refuse(self, index: int, file: DataFile, error: InputError) -> None:
        """Take the error of a file that cannot be read, by its index."""
        self.look_at(index, file.place)
        self.findings.add(Finding("ML602", error.found, error.place, error.expected, error.next_step))

    def compare_prompts(self, tokenizer: CheckpointTokenizer) -> dict[str, int]:
        """Compare prompts of the rows, once all rows are known, and add the differences; of each cause the first.

        Args:
            tokenizer: The tokenizer that judged the rows, with a chat template.

        Returns:
            The number of prompts that were compared, that mistral-common refuses, and that are left out for their
            length.
        """
        from pytest_mistral_lora.chat.templates.compare import compare

        counts = {"compared": 0, "refused": 0, "left_out": 0}
        of_rows = sum(tokens * rows for tokens, rows in self.lengths.tokens.items())
        tokens = max(_PROMPTS_IN_ANY_CASE, of_rows // _PROMPT_SHARE)
        causes: set[str] = set()
        for at, prompt in self.prompts.prompts():
            if tokens <= 0:
                counts["left_out"] += 1
                continue
            try:
                comparison = compare(prompt, tokenizer.oracle, tokenizer.template, as_prompt=True)
            except OracleRejection:
                counts["refused"] += 1
                continue
            counts["compared"] += 1
            tokens -= len(comparison.oracle.input_ids)
            self.look_at(unpacked_place(at)[0], prompt.place)
            self.findings.at = at
            for finding in backend_findings(prompt, comparison, tokenizer.oracle):
                cause = finding.shape or finding.found
                if cause not in causes:
                    causes.add(cause)
                    self.findings.add(finding)
        return counts


class RowJudge:
    """Judges rows with the tokenizer and the settings of a plan."""

    def __init__(self, plan: ScanPlan, tokenizer: CheckpointTokenizer) -> None:
        """Prepare the judge; `tokenizer` is the one of the plan."""
        self.plan = plan
        self.encoder = make_encoder(plan.backend, tokenizer)
        self._oracle: Oracle | None = None
        try:
            self._oracle = self.encoder.tokenizer.oracle
        except NoOracleError:
            if plan.backend == "mistral-common":
                raise
        self.rules = RowRules(self._oracle, sketches=plan.sketches)
        # this process renders mistral-common's own template if it has made it, which is faster
        if plan.official and self._oracle is not None:
            self._oracle.chat_template()

    def judge_chunk(self, chunk: Chunk, take: Take | None = None) -> DatasetPass:
        """Judge the lines of a chunk: a part of a pass.

        Args:
            chunk: The lines.
            take: Takes each record of a recipe as it is encoded, so that a run trains on it; None in a check.
        """
        part = DatasetPass()
        records = list(self._records(chunk))
        # a fast tokenizer takes half of the time for many texts in one call
        by_template = self._by_template(
            [
                row
                for record in records
                for row, expected in zip(record.rows, record.expected, strict=True)
                if not isinstance(expected, RowError)
            ]
        )
        for record in records:
            part.look_at(chunk.file, record.place)
            if self.plan.alone and record.columns:
                part.findings.add(column_finding(record.columns, record.place, chunk.path))
            if take is not None and record.error is not None:
                take(record.place.record or 0, None, record.error)
            self._judge_record(record, by_template, part, chunk, take)
        return part

    def _records(self, chunk: Chunk) -> Iterator[_Record]:
        """Yield the records of a chunk; a recipe trains on the rows of conversations alone."""
        path = chunk.path
        for number, line in chunk.lines:
            place, item = chunk.place(number), read_line(path, number, line)
            rows = record_rows(item, chunk.objective, place=place)
            data = item[1] if isinstance(item, tuple) else None
            columns, declared = unread_columns(data), declared_values(data)
            if isinstance(rows, tuple) and not self.plan.alone:
                try:
                    rows = (trained_row(rows),)
                except RowError as refusal:
                    rows = refusal
            if isinstance(rows, RowError):
                yield _Record(place, (), (), rows, columns=columns)
            elif rows is not None:
                yield _Record(place, rows, tuple(map(self._expected, rows)), columns=columns, declared=declared)

    def _judge_record(
        self, record: _Record, by_template: Iterator[_ByTemplate], part: DatasetPass, chunk: Chunk, take: Take | None
    ) -> None:
        """Add the rows, counts and findings of a record to a part of a pass."""
        self.rules.begin_record()
        errors: list[tuple[RowError, Row | None]] = [] if record.error is None else [(record.error, None)]
        empty = [finding for row in record.rows if (finding := empty_side(row)) is not None]
        judged: list[EncodedRow] = []
        kept: list[EncodedRow] = []
        for row, expected in zip(record.rows, record.expected, strict=True):
            found = None if isinstance(expected, RowError) else next(by_template)
            if take is not None:
                take(record.place.record or 0, row, self._trained(row, expected, found))
            try:
                if isinstance(expected, RowError):
                    raise expected
                if empty:
                    continue
                judged.append(self._judge(row, expected, found, part))
                if (encoded := self.plan.policy.apply(judged[-1]).encoded) is not None:
                    kept.append(encoded)
            except RowError as refusal:
                errors.append((refusal, row))
        unchecked = next((error for error, _ in errors if isinstance(error, UncheckedRowError)), None)
        if unchecked is not None:
            part.unchecked.take(unchecked.reason, part.findings.at, unchecked.place)
            return
        self._add(empty, None, part)
        # no tokenizer encodes an empty answer: the finding of the side says more
        for error, refused in () if empty else errors:
            finding = Finding(_rule_of(error), error.found, error.place, error.expected, error.next_step)
            self._add([finding], refused, part)
        if errors or empty:
            part.counts[chunk.file, "refused"] += 1
            return
        part.counts[chunk.file, "judged"] += 1
        kind = record.rows[0].kind
        if kind.is_chat:
            part.counts[chunk.file, "conversations"] += 1
        else:
            part.other_kinds[kind.row_title] += 1
        if len(kept) < len(record.rows):
            part.counts[chunk.file, "dropped"] += 1
            return
        first = record.rows[0]
        # a file for evaluation is held out as a whole; the split by hash is for the other files
        held_out = chunk.is_held_out or (self.plan.held_out > 0 and is_held_out(first, self.plan.held_out))
        judged_record = JudgedRecord(
            part.place,
            record.rows,
            tuple(judged),
            tuple(kept),
            is_held_out=held_out,
            declared=record.declared,
            file=chunk.file,
        )
        self._add(self.rules.observe_record(judged_record, part), None, part)

    def _add(self, findings: Iterable[Finding], row: Row | None, part: DatasetPass) -> None:
        """Add findings of a row to a part of a pass; of both sides of a pair, a fault of their prompt once."""
        for finding in self.rules.once(findings, row):
            part.findings.add(finding)

    def _expected(self, row: Row) -> EncodedRow | RowError | None:
        """Return mistral-common's encoding of a row, or its reason to refuse it; None without a Mistral tokenizer."""
        if self._oracle is None:
            return None
        try:
            return self._oracle.encode(row)
        except RowError as error:
            return error

    def _trained(
        self, row: Row, expected: EncodedRow | RowError | None, by_template: _ByTemplate
    ) -> EncodedRow | RowError:
        """Return the backend's encoding of a row, or its reason to refuse it."""
        if isinstance(by_template, EncodedRow | RowError):
            return by_template
        if self.plan.backend == "mistral-common" and expected is not None:
            return expected
        try:
            return self.encoder.encode(row)  # a row that mistral-common refuses, and the template may render
        except RowError as error:
            return error

    def _by_template(self, rows: Sequence[Row]) -> Iterator[_ByTemplate]:
        """Yield the ids of each row by the chat template; as the backend, its encoding, or its reason to refuse it."""
        if self.plan.backend == "mistral-common":
            compares = self.plan.compares
            return iter(self.encoder.template.ids_of_rows(rows) if compares else [None] * len(rows))
        template = self.encoder.template
        # a row that no template renders is refused for that
        literals = [template.control_literals(row) if row.kind.is_chat else [] for row in rows]
        found = iter(template.encode_rows(row for row, spelled in zip(rows, literals, strict=True) if not spelled))
        return (
            _LiteralError(f"the text spells {', '.join(sorted(set(spelled)))}", place=row.place)
            if spelled
            else next(found)
            for row, spelled in zip(rows, literals, strict=True)
        )

    def _judge(self, row: Row, expected: EncodedRow | None, by_template: _ByTemplate, part: DatasetPass) -> EncodedRow:
        """Add the findings of a row to a part of a pass, and return the encoding that is trained on.

        Raises:
            RowError: If the backend refuses the row.
        """
        if isinstance(by_template, RowError):
            raise by_template
        # the backend mistral-common has an oracle, and has not refused the row
        encoded = by_template if isinstance(by_template, EncodedRow) else cast("EncodedRow", expected)
        layout, length = expected or encoded, self.plan.policy.max_length
        part.lengths.note(len(encoded.input_ids), part.findings.at)
        cut: dict[str, int] = {}
        if len(encoded.input_ids) > length:
            cut = beyond(row, encoded, layout, length, self._oracle.facts if self._oracle else None)
            part.lengths.beyond.update(cut)
        faults = list(self.plan.policy.faults(encoded, row))
        self._add((fault_finding(fault, error, encoded, cut) for fault, error in faults), row, part)
        for change, finding in () if faults else changes(row, encoded, self.plan.policy, cut):
            part.lengths.changed[change] += 1
            part.findings.add(finding)
        if expected and self._oracle:
            self._add(law_findings(row, expected, self._oracle), row, part)
        self._add(self.rules.observe_row(row, layout, expected, part, spells=encoded is expected), None, part)
        if expected is not None and self.plan.compares and row.kind.is_chat:
            ids = by_template.input_ids if isinstance(by_template, EncodedRow) else by_template
            if not self._agrees(row, expected, encoded, ids, part):
                return expected
        return encoded

    def _agrees(
        self,
        row: Row,
        expected: EncodedRow,
        encoded: EncodedRow,
        template_ids: tuple[int, ...] | None,
        part: DatasetPass,
    ) -> bool:
        """Return whether the encoding that is trained on has mistral-common's labels; report a difference."""
        # a row that the template refuses has no ids, and is explained like a row with other ids
        same_ids = template_ids == expected.input_ids
        if same_ids or self._explain(row, template_ids, part):
            part.prompts.note(row, part.findings.at)
        if not same_ids or encoded.labels in (None, expected.labels):
            return True
        oracle: Any = self._oracle
        sides = (expected.input_ids, expected.labels), (encoded.input_ids, encoded.labels)
        difference = TokenDiff.of(*sides, oracle.piece, _NAMES, expected.spans)
        parts = shown_difference(difference, row.place)
        found = with_shape("the generation blocks mark other tokens than the assistant's", parts["shape"])
        self._add([Finding("ML606", found, row.place, row=printed_row(row), **parts)], row, part)
        return False

    def _explain(self, row: Row, template_ids: tuple[int, ...] | None, part: DatasetPass) -> bool:
        """Return whether named deviations explain the template's ids; report what they do not explain."""
        from pytest_mistral_lora.chat.templates.compare import compare
        from pytest_mistral_lora.chat.templates.faults import OWN_PROMPT

        oracle: Any = self._oracle
        template = self.encoder.template
        try:
            behind = template.behind_own_prompt(row)
            if behind is not row and oracle.encode(behind).input_ids == template_ids:
                # most rows of a template with its own system prompt: there is nothing else to explain
                part.deviations.note(OWN_PROMPT, row.place, part.findings.at)
                return True
            comparison = compare(row, oracle, template)
        except RowError as error:
            text = f"the chat template differs from mistral-common, and the two cannot be compared: {error.found}"
            self._add([Finding("ML603", text, row.place, row=printed_row(row))], row, part)
            return False
        for name in (*comparison.deviations, *([OWN_PROMPT] if comparison.own_prompt else [])):
            part.deviations.note(name, row.place, part.findings.at)
        self._add(backend_findings(row, comparison, oracle), row, part)
        return not comparison.differences


class _LiteralError(RowError):
    """A row whose text the chat template would encode as control tokens."""


def _rule_of(error: RowError) -> str:
    if isinstance(error, _LiteralError):
        return "ML613"  # the row is valid, but not for this backend: mistral-common could train on it
    return "ML621" if isinstance(error, ResultIdError) else "ML601"
