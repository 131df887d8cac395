"""Faults of a whole file, which show in the counts of its texts: one answer for all rows, a cut, a wrong decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.rows import RecordKind, imported
from pytest_mistral_lora.conformance.dataset.file_signs import (
    ANSWER_UNITS,
    ANSWERS,
    CALLS,
    CALLS_AS_TEXT,
    EACH_ANSWER,
    EMPTY_CELL,
    INVISIBLE,
    LETTERS_LOST,
    NO_PROMPT,
    OF_A_PROGRAM,
    ROWS,
    FileSigns,
)
from pytest_mistral_lora.conformance.dataset.sign_count import SignCount, SignExample
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedFiles, JudgedRecord, ObserverStates
from pytest_mistral_lora.conformance.row_table import LINE_BITS
from pytest_mistral_lora.errors import counted


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
    # a row may be about an empty cell, and a tool may return it; a tenth of a file is not
    FileFault(EMPTY_CELL, "ML643", "pandas' word for an empty cell as a text", Bound(10, 0.1)),
    # a page of the web has a few
    FileFault(INVISIBLE, "ML636", "characters of no width between letters", Bound(10, 0.1)),
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


_MOST = 0.8
"""The share of answers that have a word in common, if it tells them from others."""
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


class FaultsOfFiles:
    """The faults of whole files that the signs of their rows, and their last answers, show."""

    case = "statistics"
    fires_on_sample = False

    def start(self) -> FileSigns:
        """Return the state of no row."""
        return FileSigns()

    def observe(self, record: JudgedRecord, state: FileSigns) -> Iterator[Finding]:
        """Note the signs of a record."""
        state.note(record)
        return iter(())

    def report(self, state: FileSigns, files: JudgedFiles) -> Iterator[Finding]:
        """Yield each fault that enough rows of a file have, in the order of the first rows that have them."""
        found: list[FaultyRows] = []
        for faulty in faulty_rows(state, files):
            if faulty.severity:
                found.append(faulty)
            examples = faulty.count.examples
            known = state.figures.setdefault(faulty.fault.name, {"rows": 0, "examples": []})
            known["rows"] += faulty.count.rows
            known["examples"] += [str(example.place) for example in examples][: SignCount.MOST - len(known["examples"])]
        for faulty in sorted(found, key=lambda faulty: faulty.count.examples[0].at):
            yield faulty.finding()


FAULTY_FILES = FaultsOfFiles()
"""The observer of the faults of whole files."""


def fault_figures(states: ObserverStates) -> dict[str, Any]:
    """Return the rows that have each fault of a file, and the first of them, by its name, once they were reported."""
    signs: FileSigns = states.of(f"{__name__}:FAULTY_FILES")
    return signs.figures


def faulty_rows(state: FileSigns, files: JudgedFiles) -> Iterator[FaultyRows]:
    """Yield each fault of each file, however few rows have it.

    Args:
        state: The signs of all rows.
        files: The files, and the table of their rows.
    """
    of_rows = np.frombuffer(files.table.places, np.uint64) >> np.uint64(LINE_BITS)
    ends = np.searchsorted(of_rows, np.arange(len(files) + 1, dtype=np.uint64))
    for index in range(len(files)):
        rows = slice(int(ends[index]), int(ends[index + 1]))
        found = [
            *(_rows_with(fault, state, index) for fault in _SIGNS),
            *_no_answers(state, index, rows),
            *_same_answers(state, index, rows, files),
            *_cut_answers(state, index),
            *_lost_prompts(state, index),
            *_mixed_calls(state, index),
            *_faults_of_kinds(state, index),
        ]
        yield from (faulty for faulty in found if faulty.count.rows)


def _rows_with(fault: FileFault, state: FileSigns, file: int) -> FaultyRows:
    of = state.counts[file, ANSWERS if fault.unit == "answer" else ROWS]
    return FaultyRows(fault, state.signs.get((file, fault.name), SignCount()), of)


def _no_answers(state: FileSigns, file: int, rows: slice) -> Iterator[FaultyRows]:
    """Yield the rows whose answer is a word for nothing, unless the other answers are short values, too."""
    without = state.signs.get((file, _NONE.name), SignCount())
    answers = np.frombuffer(state.last, np.uint32)[rows]
    others = int((answers != 0).sum()) - without.rows
    if 2 * int((answers % 2 == 1).sum()) >= others:
        yield FaultyRows(_NONE, without, state.counts[file, ROWS])


def _same_answers(state: FileSigns, file: int, rows: slice, files: JudgedFiles) -> Iterator[FaultyRows]:
    """Yield the most frequent long answer, and the most frequent short one, if several different rows have it.

    One answer in every row is what a file is about, unless it is a message of a program.
    """
    answers = np.frombuffer(state.last, np.uint32)[rows]
    # half of each digest; a row that stands there twice counts once
    digests = np.frombuffer(files.table.rows, np.uint64)[::2][rows]
    with_answer = answers != 0
    for fault, is_long in ((_SAME, 1), (_SAME_SHORT, 0)):
        checksums, counts = np.unique(answers[with_answer & (answers % 2 == is_long)], return_counts=True)
        if not len(counts):
            continue
        same = np.flatnonzero(answers == checksums[counts.argmax()])
        different = len(np.unique(digests[same]))
        is_every = len(same) == with_answer.sum() > state.counts[file, OF_A_PROGRAM]
        if different > 1:
            # as few as a label is short
            fault = _SAME_SHORT if is_every else fault
            indices = [rows.start + int(row) for row in same[: SignCount.MOST]]
            first = [SignExample(files.table.places[row], "", files.place_of_row(row)) for row in indices]
            yield FaultyRows(fault, SignCount(different, first), int(with_answer.sum()))


def _cut_answers(state: FileSigns, file: int) -> Iterator[FaultyRows]:
    """Yield the answers that end in the middle of a sentence at one length, which hardly any other answer exceeds.

    Answers of one form, which end by themselves, are none.
    """
    for unit in ANSWER_UNITS:
        lengths = state.lengths.get((file, unit), Counter())
        within = state.open_ends.get((file, unit), {})
        most = sum(count.rows for count in within.values())
        longer = 0
        for length in sorted(lengths, reverse=True):
            at_cut = range(length - _NEAR_CUT, length + 1)
            cut = _rows_at(within, at_cut)
            below = _rows_at(within, range(at_cut.start - len(at_cut), at_cut.start))
            whole = sum(lengths[other] for other in at_cut) - cut
            if max(longer, 1) * _SPIKE <= cut and max(below, whole, 1) * _SPIKE <= cut:
                count, words = SignCount(), Counter[int]()
                for other in at_cut:
                    count.extend(within.get(other, SignCount()))
                    words.update(state.end_words.get((file, unit, other), {}))
                # a cut falls anywhere; texts of one form end with one word, or with a value behind one
                if 2 * max(words.values(), default=0) > count.rows:
                    return
                yield FaultyRows(_CUT, count, lengths.total(), f", after {length:,} {unit},")
                return
            longer += lengths[length]
            if longer * _SPIKE > most:
                break


def _rows_at(within: Mapping[int, SignCount], lengths: range) -> int:
    return sum(within[length].rows for length in lengths if length in within)


def _lost_prompts(state: FileSigns, file: int) -> Iterator[FaultyRows]:
    """Yield the rows without a system prompt if many others have one, and all of these have the same.

    If the answers without it are of another kind, the prompt asks for a task that the other rows do not have.
    """
    of_kinds = sum(state.counts[file, kind.count] for kind in KINDS.values() if kind.count)
    rows = state.counts[file, ROWS] - of_kinds
    without = state.signs.get((file, NO_PROMPT), SignCount())
    least, most = state.system_prompts.get(file, (0, 1))
    if least == most and _PROMPT.severity(rows - without.rows, rows) and not _answers_differ(state, file):
        yield FaultyRows(_PROMPT, without, rows, ", which is the same in all other rows,")


def _answers_differ(state: FileSigns, file: int) -> bool:
    """Return whether nearly all answers behind a system prompt have a word that nearly no other has, or the reverse."""
    behind, others = (state.words.get((file, has_prompt), Counter()) for has_prompt in (True, False))
    shares = (
        [words[key] / max(words[EACH_ANSWER], 1) for words in (behind, others)] for key in behind.keys() | others.keys()
    )
    return any(max(pair) >= _MOST and min(pair) <= 1 - _MOST for pair in shares)


def _faults_of_kinds(state: FileSigns, file: int) -> Iterator[FaultyRows]:
    """Yield the rows of each kind with the signs that it alone has, counted among its rows."""
    for kind in KINDS.values():
        for fault in _faults_of_kind(kind):
            yield FaultyRows(fault, state.signs.get((file, fault.name), SignCount()), state.counts[file, kind.count])


def _mixed_calls(state: FileSigns, file: int) -> Iterator[FaultyRows]:
    """Yield the rows with the rarer of two forms of calls."""
    forms = [state.signs.get((file, name), SignCount()) for name in (CALLS_AS_TEXT, CALLS)]
    if all(form.rows for form in forms):
        yield FaultyRows(_CALLS, min(forms, key=lambda form: form.rows), sum(form.rows for form in forms))
