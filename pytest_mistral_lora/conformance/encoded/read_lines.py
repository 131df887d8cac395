"""Lines without messages: their conversations, read back from the ids."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.diff import decode_text
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.kinds.records import as_side
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle
from pytest_mistral_lora.chat.oracle.read_back import EMPTY_ANSWER, UnreadableIdsError, read_back
from pytest_mistral_lora.chat.rows import Row, weight_of
from pytest_mistral_lora.conformance.encoded.integers import Ids
from pytest_mistral_lora.conformance.encoded.lines import EncodedLine, likely_tokens
from pytest_mistral_lora.conformance.encoded.packing import cut_at_starts
from pytest_mistral_lora.conformance.encoded.row_faults import other_oracles, outside_fault
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.places import Place

_MOST_TRIES = 20
"""Conversations in a row that the other shipped tokenizers try to read."""


@dataclass(frozen=True, slots=True)
class ReadLine:
    """A line whose conversations were read back.

    Attributes:
        line: The line with its conversations.
        expected: mistral-common's encoding of each; of a conversation that cannot be read, the line's own ids, so that
            the others can be judged. Empty if no conversation can be read.
        findings: A finding for each conversation that cannot be read.
        without_labels: Number of answers that were read with the weight 0.
    """

    line: EncodedLine
    expected: tuple[EncodedRow, ...]
    findings: tuple[Finding, ...]
    without_labels: int


@dataclass(frozen=True, slots=True)
class LineStretch:
    """The ids of one conversation.

    Attributes:
        place: The place of the conversation.
        tokens: The index of each token in the line.
        ids: Its ids.
        labels: Its labels; fewer than ids if the line has fewer.
    """

    place: Place
    tokens: Ids
    ids: Ids
    labels: Ids


class LineReader:
    """Reads the lines of one file."""

    def __init__(self, oracle: Oracle, path: Path | None, *, weighs: bool = True) -> None:
        """Prepare the reader.

        Args:
            oracle: Mistral's own tokenization.
            path: The file or folder, for the next step of a finding; None if the rows are in no file of the user.
            weighs: Whether labels give the answers their weights; else each has the weight 1.
        """
        self._weighs = weighs
        self._oracle = oracle
        self._path = path
        self._tries = _MOST_TRIES

    def begin(self) -> None:
        """Begin a part of a file: each part has tries of its own, so that its verdict depends on no other part."""
        self._tries = _MOST_TRIES

    def read(self, line: EncodedLine) -> ReadLine:
        """Read the conversations of a line that has ids alone."""
        rows: list[Row] = []
        expected: list[EncodedRow] = []
        findings: list[Finding] = []
        stretches = list(stretches_of(line, self._oracle))
        for stretch in stretches:
            try:
                row, encoded = self._read_stretch(stretch)
            except _UnreadStretchError as error:
                findings.append(error.finding)
                # it stands for itself, so that the others can be judged
                row, encoded = Row(()), EncodedRow(stretch.ids, stretch.labels, ())
            # a side of a pair is a side without its messages, too; only conversations have sides
            rows.append(row if line.side is None or not row.kind.is_chat else as_side(row, line.side.row_side))
            expected.append(encoded)
        if len(findings) == len(stretches):
            return ReadLine(line, (), tuple(findings), 0)
        answers = [message for row in rows for message in row.messages if message["role"] == "assistant"]
        # the answers in the prompt of a pair have no labels
        weightless = 0 if line.side else sum(not weight_of(message) for message in answers)
        line = replace(line, rows=tuple(rows), packed=len(rows) > 1)
        return ReadLine(line, tuple(expected), tuple(findings), weightless)

    def _read_stretch(self, stretch: LineStretch) -> tuple[Row, EncodedRow]:
        """Return the row of a conversation, and its encoding.

        Raises:
            _UnreadStretchError: If it cannot be read.
        """
        try:
            row = self._row(stretch)
            encoded = self._oracle.encode(row)
            if encoded.input_ids != stretch.ids and (apart := self._with_neighbours_apart(row, stretch.ids)):
                return apart
        except UnreadableIdsError as error:
            other = None if self._lacks_an_answer(stretch, error) else self._of_another_tokenizer(stretch)
            finding = other or self._unreadable(stretch, error)
            raise _UnreadStretchError(finding) from error
        except OracleRejection as error:
            refused = Finding("ML507", error.found, error.place, error.expected, row=row.to_jsonl())
            raise _UnreadStretchError(self._of_another_tokenizer(stretch) or refused) from error
        if not self._weighs and encoded.input_ids == stretch.ids:
            return self._with_trained_neighbours(row, encoded, stretch.labels)
        return row, encoded

    def _row(self, stretch: LineStretch) -> Row:
        """Return the row of a conversation; if labels give no weights, its answers have the weight 1.

        Raises:
            UnreadableIdsError: If it cannot be read.
        """
        by_labels = None
        # labels tell where a completion begins, and which text spells a marker
        if self._weighs or not self._oracle.facts.control_tokens:
            by_labels = read_back(stretch.ids, self._oracle, stretch.labels, place=stretch.place)
            if self._weighs:
                return by_labels
            by_labels = by_labels.unweighed() if by_labels.kind.is_chat else by_labels
            if self._has_ids(by_labels, stretch.ids):
                return by_labels
        row = read_back(stretch.ids, self._oracle, place=stretch.place)
        return row if row.kind.is_chat else read_back(stretch.ids, self._oracle, stretch.labels, place=stretch.place)

    def _has_ids(self, row: Row, ids: Ids) -> bool:
        try:
            return self._oracle.encode(row).input_ids == ids
        except OracleRejection:
            return False

    def _with_trained_neighbours(self, row: Row, encoded: EncodedRow, labels: Ids) -> tuple[Row, EncodedRow]:
        """Return a row whose neighbouring answers have the weights that fit their labels best.

        Answers that follow each other are turns of their own only if their weights differ, and the ids do not tell
        which of them has the weight 1.
        """
        trained = {
            span.turn
            for span in encoded.spans
            if span.is_answer and any(label != IGNORE_INDEX for label in labels[span.start : span.end])
        }
        turns = dict.fromkeys(span.turn for span in encoded.spans if span.is_answer)
        messages = list(row.messages)
        runs: list[list[tuple[int | None, Sequence[int]]]] = []
        for turn, group in zip(turns, row.assistant_groups(), strict=True):
            if not runs or runs[-1][-1][1][-1] + 1 != group[0]:
                runs.append([])
            runs[-1].append((turn, group))
        for run in runs:
            fitting = sum(bool(weight_of(messages[group[0]])) == (turn in trained) for turn, group in run)
            if len(run) > 1 and fitting < len(run) - fitting:
                for at in (at for _, group in run for at in group):
                    messages[at] = {**messages[at], "weight": 1 - weight_of(messages[at])}
        if messages == [*row.messages]:
            return row, encoded
        row = replace(row, messages=tuple(messages))
        return row, self._oracle.encode(row)

    def _with_neighbours_apart(self, row: Row, ids: tuple[int, ...]) -> tuple[Row, EncodedRow] | None:
        """Return a row with a system message between neighbouring texts of the user, if it has the ids.

        A tokenizer that writes the system prompt into a text of the user writes both texts as turns, and joins them
        only without that message. The ids do not tell where the system message was.
        """
        if self._oracle.facts.system_in == "own-turn":
            return None
        messages: list[Mapping[str, Any]] = []
        for message in row.messages:
            if messages and message["role"] == messages[-1]["role"] == "user":
                messages.append({"role": "system", "content": ""})
            messages.append(message)
        apart = replace(row, messages=tuple(messages))
        try:
            encoded = self._oracle.encode(apart)
        except OracleRejection:
            return None
        return (apart, encoded) if encoded.input_ids == ids else None

    def _lacks_an_answer(self, stretch: LineStretch, error: UnreadableIdsError) -> bool:
        """Return whether ids are a conversation of this tokenizer up to an answer that is empty."""
        if error.found != EMPTY_ANSWER:
            return False
        # few ids may be those of a conversation of another tokenizer by chance
        answered = (*stretch.ids[: error.token], *self._oracle.encode_text("x"), self._oracle.eos_id)
        return _reads(answered, self._oracle)

    def _of_another_tokenizer(self, stretch: LineStretch) -> Finding | None:
        """Return a finding that names the shipped tokenizer whose ids they are, if there is one."""
        # a file with a fault in each row is not read by each tokenizer to its end
        for name, other in other_oracles(self._oracle) if self._tries else ():
            if _reads(stretch.ids, other):
                self._tries = _MOST_TRIES
                found = f"these are the ids of {name} ({SHIPPED[name]})"
                return Finding("ML532", found, stretch.place, f"those of {self._oracle.path.name}")
        self._tries = max(0, self._tries - 1)
        return None

    def _unreadable(self, stretch: LineStretch, error: UnreadableIdsError) -> Finding:
        """Return the finding of ids that are no conversation."""
        starts_with_text = stretch.ids and stretch.ids[0] not in self._oracle.control_tokens
        if starts_with_text and decode_text(stretch.ids[:20], self._oracle).lstrip().startswith("<s>"):
            return Finding("ML524", "<s> is there as text, not as control token", stretch.place)
        if outside := outside_fault(stretch.ids, self._oracle):
            return Finding(outside.rule, outside.found, stretch.place, outside.expected)
        end = stretch.tokens[-1] + 1 if stretch.tokens else 0
        token = stretch.tokens[error.token] if error.token < len(stretch.tokens) else end
        detail = ""
        if self._path is not None:
            step = f"mistral-lora check {shlex.quote(str(self._path))} --tokenizer PATH --dataset rows.jsonl"
            detail = f"If the rows that the ids were made of are at hand, judge the ids by them: {step}"
        return Finding("ML560", f"token {token}: {error.found}", stretch.place, error.expected, detail)


class _UnreadStretchError(Exception):
    """A conversation that cannot be judged.

    Attributes:
        finding: The reason.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.found)
        self.finding = finding


def stretches_of(line: EncodedLine, oracle: Oracle) -> Iterator[LineStretch]:
    """Yield the ids of each conversation of a line, by its position ids and BOS tokens."""
    real = likely_tokens(line, oracle)
    # most lines have no padding
    is_whole = len(real) == len(line.input_ids)
    ids = line.input_ids if is_whole else tuple(line.input_ids[n] for n in real)
    positions = line.position_ids
    if positions is not None and not is_whole:
        positions = tuple(positions[n] for n in real)
    # a side of a pair is one conversation, however many BOS it has
    cuts = [(0, len(ids))] if line.side else cut_at_starts(ids, positions, oracle)
    for number, (start, end) in enumerate(cuts or [(0, 0)]):
        place = line.place / "conversations" / number if len(cuts) > 1 else line.place
        labels = line.labels[start:end]
        if not is_whole:
            labels = tuple(line.labels[n] for n in real[start:end] if n < len(line.labels))
        yield LineStretch(place, real[start:end], ids[start:end], labels)


def _reads(ids: Ids, oracle: Oracle) -> bool:
    """Return whether a tokenizer encodes some conversation to these ids."""
    try:
        return oracle.encode(read_back(ids, oracle)).input_ids == ids
    except (UnreadableIdsError, OracleRejection):
        return False
