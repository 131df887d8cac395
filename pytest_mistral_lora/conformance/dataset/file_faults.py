"""Faults of a whole file, which show in the counts of its texts: one answer for all rows, a cut, a wrong decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.rows import RecordKind, imported
from pytest_mistral_lora.conformance.dataset.file_signs import (
    ANSWER_UNITS,
    ANSWERS,
    CALLS,
    CALLS_AS_TEXT,
    LETTERS_LOST,
    NO_PROMPT,
    OF_A_PROGRAM,
)
from pytest_mistral_lora.conformance.dataset.tally import LINE_BITS, DatasetTally, SignCount, SignExample
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place


@dataclass(frozen=True, slots=True)
class Bound:
    """The least number of rows, and the least share of a file's rows, from which on a fault is reported.

    Attributes:
        rows: The number.
        share: The share.
        is_exceeded: Whether the share is to be exceeded.
    """

    rows: int
    share: float
    is_exceeded: bool = False

    def is_reached(self, rows: int, of: int) -> bool:
        """Return whether so many of the rows of a file reach both."""
        least = self.share * of
        return rows >= self.rows and (rows > least if self.is_exceeded else rows >= least)


@dataclass(frozen=True, slots=True)
class FileFault:
    """A fault that the counts of a file show: a sign, which is a note.

    Attributes:
        name: Its name in the figures.
        rule: The rule that it breaks.
        sign: What a row with it has.
        note: The bound of a note; None if it is a figure alone.
        error: The bound of an error, for letters that were lost, which no prompt can ask for; else None.
        unit: What is counted.
    """

    name: str
    rule: str
    sign: str
    note: Bound | None
    error: Bound | None = None
    unit: str = "row"

    def severity(self, rows: int, of: int) -> str:
        """Return `error`, `note`, or the empty string if too few rows have it."""
        if self.error is not None and self.error.is_reached(rows, of):
            return "error"
        return "note" if self.note is not None and self.note.is_reached(rows, of) else ""


_SIGNS = (
    FileFault("decoded_wrongly", "ML636", "letters of a wrong decoding", Bound(1, 0)),
    # a few rows with U+FFFD are notes of ML617
    FileFault(
        LETTERS_LOST, "ML636", "U+FFFD in place of letters", None, Bound(2, 0.05, is_exceeded=True), unit="answer"
    ),
    FileFault("html_entities", "ML637", "an entity of HTML in prose", Bound(1, 0)),
    FileFault("html_tags", "ML660", "tags of HTML in prose", Bound(5, 0.05)),
    FileFault("message_unfilled", "ML638", "a placeholder as a whole message", Bound(1, 0)),
    FileFault("media_unfilled", "ML638", "a placeholder for media", Bound(1, 0)),
    FileFault("field_unfilled", "ML638", "a placeholder for a field", Bound(5, 0.05)),
    FileFault("name_unfilled", "ML638", "a placeholder for a name", Bound(5, 0.05)),
    # a few rows that spell a control token are notes of ML612; the oracle shows that they are letters
    FileFault("rendered", "ML639", "a control token at an end of a text", None, Bound(10, 0.1)),
    FileFault("missing_value", "ML643", "a word for a missing value as a text", Bound(1, 0)),
)
"""Faults of rows that each show a sign of it."""

_NONE = FileFault("none_as_answer", "ML643", "None, null or N/A as the answer", Bound(10, 0.1))
_SAME = FileFault("same_answer", "ML644", "the same answer", Bound(10, 0.2))
# one label, or one refusal, is what a file may be about
_SAME_SHORT = FileFault("same_short_answer", "ML644", "the same short answer", None)
_CUT = FileFault("answers_cut", "ML645", "an answer cut at one length", Bound(5, 0.005))
_PROMPT = FileFault("system_prompt_lost", "ML646", "no system prompt", Bound(20, 0.25))
_CALLS = FileFault("calls_mixed", "ML647", "a call in another form than the others'", Bound(1, 0))


def file_faults() -> tuple[FileFault, ...]:
    """Return every fault: those of any texts, and those that only one kind of rows can have."""
    of_kinds = (fault for kind in KINDS.values() for fault in _faults_of_kind(kind))
    return (*_SIGNS, _NONE, _SAME, _SAME_SHORT, _CUT, _PROMPT, _CALLS, *of_kinds)


def _faults_of_kind(kind: RecordKind) -> tuple[FileFault, ...]:
    faults: tuple[FileFault, ...] = imported(kind.file_faults) if kind.file_faults else ()
    return faults


_SPIKE = 5
"""By what factor more answers are cut at one length than are longer, end there by chance, or end a little below it."""
_NEAR_CUT = 2
"""By how much a cut answer may be shorter than the cut: the space at its end is often removed, too."""


@dataclass(frozen=True)
class FaultyRows:
    """The rows of a file that have a fault.

    Attributes:
        fault: The fault.
        count: Their number, and the first of them.
        of: The number of rows that could have it.
        more: More about what these rows have.
    """

    fault: FileFault
    count: SignCount
    of: int
    more: str = ""

    @property
    def severity(self) -> str:
        """`error`, `note`, or the empty string if the rows are too few for a finding."""
        return self.fault.severity(self.count.rows, self.of)

    def finding(self) -> Finding:
        """Return the finding, at the first of the rows."""
        rows, rule = self.count.rows, self.fault.rule
        examples = self.count.examples
        detail = "\n".join(", ".join(filter(None, (str(example.place), example.shown))) for example in examples)
        found = (
            f"{self.fault.sign}{self.more} in {rows:,} of {counted(self.of, self.fault.unit)} ({rows / self.of:.1%})"
        )
        finding = Finding(rule, found, examples[0].place, detail=detail)
        return replace(finding, severity="error") if self.severity == "error" else finding


def faulty_rows(tally: DatasetTally, files: int, place: Callable[[int], Place]) -> Iterator[FaultyRows]:
    """Yield each fault of each file, however few rows have it.

    Args:
        tally: The result of a pass, in order.
        files: The number of files that it read.
        place: Returns the place of a row by its index.
    """
    of_rows = np.frombuffer(tally.places, np.uint64) >> np.uint64(LINE_BITS)
    ends = np.searchsorted(of_rows, np.arange(files + 1, dtype=np.uint64))
    for index in range(files):
        found = [
            *(_rows_with(fault, tally, index) for fault in _SIGNS),
            *_no_answers(tally, index, slice(int(ends[index]), int(ends[index + 1]))),
            *_same_answers(tally, index, slice(int(ends[index]), int(ends[index + 1])), place),
            *_cut_answers(tally, index),
            *_lost_prompts(tally, index),
            *_mixed_calls(tally, index),
            *_faults_of_kinds(tally, index),
        ]
        yield from (faulty for faulty in found if faulty.count.rows)


def _rows_with(fault: FileFault, tally: DatasetTally, file: int) -> FaultyRows:
    of = tally.counts[file, ANSWERS if fault.unit == "answer" else "rows"]
    return FaultyRows(fault, tally.signs.get((file, fault.name), SignCount()), of)


def _no_answers(tally: DatasetTally, file: int, rows: slice) -> Iterator[FaultyRows]:
    """Yield the rows whose answer is a word for nothing, unless the other answers are short values, too."""
    without = tally.signs.get((file, _NONE.name), SignCount())
    answers = np.frombuffer(tally.answers, np.uint32)[rows]
    others = int((answers != 0).sum()) - without.rows
    if 2 * int((answers % 2 == 1).sum()) >= others:
        yield FaultyRows(_NONE, without, tally.counts[file, "rows"])


def _same_answers(tally: DatasetTally, file: int, rows: slice, place: Callable[[int], Place]) -> Iterator[FaultyRows]:
    """Yield the most frequent long answer, and the most frequent short one, if several different rows have it.

    One answer in every row is what a file is about, unless it is a message of a program.
    """
    answers = np.frombuffer(tally.answers, np.uint32)[rows]
    # half of each digest; a row that stands there twice counts once
    digests = np.frombuffer(tally.rows, np.uint64)[::2][rows]
    with_answer = answers != 0
    for fault, is_long in ((_SAME, 1), (_SAME_SHORT, 0)):
        checksums, counts = np.unique(answers[with_answer & (answers % 2 == is_long)], return_counts=True)
        if not len(counts):
            continue
        same = np.flatnonzero(answers == checksums[counts.argmax()])
        different = len(np.unique(digests[same]))
        is_every = len(same) == with_answer.sum() > tally.counts[file, OF_A_PROGRAM]
        if different > 1:
            # as few as a label is short
            fault = _SAME_SHORT if is_every else fault
            indices = [rows.start + int(row) for row in same[: SignCount.MOST]]
            first = [SignExample(tally.places[row], "", place(row)) for row in indices]
            yield FaultyRows(fault, SignCount(different, first), int(with_answer.sum()))


def _cut_answers(tally: DatasetTally, file: int) -> Iterator[FaultyRows]:
    """Yield the answers that end in the middle of a sentence at one length, which hardly any other answer exceeds."""
    for unit in ANSWER_UNITS:
        lengths = tally.answer_lengths.get((file, unit), Counter())
        within = tally.open_answers.get((file, unit), {})
        most = sum(count.rows for count in within.values())
        longer = 0
        for length in sorted(lengths, reverse=True):
            at_cut = range(length - _NEAR_CUT, length + 1)
            cut = _rows_at(within, at_cut)
            below = _rows_at(within, range(at_cut.start - len(at_cut), at_cut.start))
            whole = sum(lengths[other] for other in at_cut) - cut
            if max(longer, 1) * _SPIKE <= cut and max(below, whole, 1) * _SPIKE <= cut:
                count = SignCount()
                for other in at_cut:
                    count.extend(within.get(other, SignCount()))
                yield FaultyRows(_CUT, count, lengths.total(), f", after {length:,} {unit},")
                return
            longer += lengths[length]
            if longer * _SPIKE > most:
                break


def _rows_at(within: Mapping[int, SignCount], lengths: range) -> int:
    return sum(within[length].rows for length in lengths if length in within)


def _lost_prompts(tally: DatasetTally, file: int) -> Iterator[FaultyRows]:
    """Yield the rows without a system prompt if many others have one, and all of these have the same."""
    of_kinds = sum(tally.counts[file, kind.count] for kind in KINDS.values() if kind.count)
    rows = tally.counts[file, "rows"] - of_kinds
    without = tally.signs.get((file, NO_PROMPT), SignCount())
    least, most = tally.system_prompts.get(file, (0, 1))
    if least == most and _PROMPT.severity(rows - without.rows, rows):
        yield FaultyRows(_PROMPT, without, rows, ", which is the same in all other rows,")


def _faults_of_kinds(tally: DatasetTally, file: int) -> Iterator[FaultyRows]:
    """Yield the rows of each kind with the signs that it alone has, counted among its rows."""
    for kind in KINDS.values():
        for fault in _faults_of_kind(kind):
            count = tally.signs.get((file, fault.name), SignCount())
            yield FaultyRows(fault, count, tally.counts[file, kind.count])


def _mixed_calls(tally: DatasetTally, file: int) -> Iterator[FaultyRows]:
    """Yield the rows with the rarer of two forms of calls."""
    forms = [tally.signs.get((file, name), SignCount()) for name in (CALLS_AS_TEXT, CALLS)]
    if all(form.rows for form in forms):
        yield FaultyRows(_CALLS, min(forms, key=lambda form: form.rows), sum(form.rows for form in forms))
