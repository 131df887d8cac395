"""What the rows of a file declare about their answers beside the text: a rating, a number, or that they were cut."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.dataset.sign_count import SignCount
from pytest_mistral_lora.conformance.dataset.whole_file_sign import FEWEST, WholeFileSign
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedRecord, extend_states
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.formats.declared_keys import DECLARED_KEYS, is_signed, number_of
from pytest_mistral_lora.places import Place

_RATINGS = (
    ("true", "false"),
    ("good", "bad"),
    ("desirable", "undesirable"),
    ("wanted", "unwanted"),
    ("chosen", "rejected"),
    ("accepted", "rejected"),
    ("liked", "disliked"),
    ("like", "dislike"),
    ("thumbs_up", "thumbs_down"),
    ("thumbs up", "thumbs down"),
)
"""Words for a wanted answer and one that is not."""

_MOST_VALUES = 3
"""Most values of a rating: good, bad, and one between them."""


@dataclass
class _Column:
    """What rows have under one key.

    Attributes:
        rows: Number of rows that have it.
        values: Each value, letters in small ones, with a checksum of the answers beside it, or 0 if they differ; at
            most one value more than a rating has.
        classes: Number of values that stand in the answer of their row, as a class does.
        negative: Number of rows with -1.
        bad: Number of rows with a value that `import` takes for the mark of a bad answer.
        least: The least number.
        most: The greatest number.
    """

    rows: int = 0
    values: dict[float | str, int] = field(default_factory=dict)
    classes: int = 0
    negative: int = 0
    bad: int = 0
    least: float = math.inf
    most: float = -math.inf

    def note(self, value: Any, answer: str, *, is_bad: bool) -> None:
        """Add the value of a row."""
        key: float | str = value.strip().lower() if isinstance(value, str) else ""
        number = None if isinstance(value, bool) else number_of(value)
        if isinstance(value, bool):
            # letters are small ones, and True is 1 as a key
            key = str(value)
        elif number is not None and not math.isnan(number):
            key, self.least, self.most = number, min(self.least, number), max(self.most, number)
        self.rows += 1
        self.negative += number == -1
        self.bad += is_bad
        self.classes += isinstance(key, str) and bool(key) and key in answer.lower()
        self._add(key, zlib.crc32(answer.encode("utf-8", "replace")) or 1)

    def _add(self, value: float | str, answer: int) -> None:
        if value in self.values or len(self.values) <= _MOST_VALUES:
            self.values[value] = answer if self.values.get(value, answer) == answer else 0

    def extend(self, other: _Column) -> None:
        """Add the values of other rows."""
        for value, answer in other.values.items():
            self._add(value, answer)
        self.rows += other.rows
        self.classes += other.classes
        self.negative += other.negative
        self.bad += other.bad
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)

    @property
    def is_class(self) -> bool:
        """Whether the value names the answer: each value has one answer, and most letters stand in it."""
        is_fixed = len(self.values) <= _MOST_VALUES and self.rows > len(self.values) and all(self.values.values())
        return is_fixed or 2 * self.classes >= self.rows

    def words(self, key: str) -> str:
        """Return in words what the key may say of an answer; empty if it tells no answer from another."""
        if self.bad:
            return f"`{key}`, by which import takes {counted(self.bad, 'answer')} for bad"
        if DECLARED_KEYS[key].is_mark and self.values.keys() == {"True", "False"} and not self.is_class:
            return f"`{key}`, which is true or false"
        # numbers under `label` are classes, unless they are signs
        is_rating = not DECLARED_KEYS[key].is_mark or self.values.keys() <= {-1, 0, 1}
        if self.least < self.most and is_rating and not self.is_class:
            return f"`{key}`, from {self.least:g} to {self.most:g}"
        return ""


@dataclass
class DeclaredAnswers:
    """What the rows of a file declare about their answers.

    Attributes:
        rows: Number of rows that are conversations.
        columns: What conversations have under each key.
    """

    rows: int = 0
    columns: dict[str, _Column] = field(default_factory=dict)

    def note(self, record: JudgedRecord) -> None:
        """Add a row; what a pair declares says nothing about one of its sides, and a rated answer has its label."""
        row = record.rows[0]
        if len(record.rows) > 1 or row.kind.sides or not row.kind.is_chat or not row.kind.counts_as_wanted(row):
            return
        self.rows += 1
        if not _ends_with_a_trained_answer(row):
            return
        answer = text_of(row.messages[row.assistant_groups()[-1][-1]].get("content"))
        for key, value in record.declared:
            is_bad = DECLARED_KEYS[key].is_bad(value)
            self.columns.setdefault(key, _Column()).note(value, answer, is_bad=is_bad)

    def extend(self, other: DeclaredAnswers) -> None:
        """Add other rows."""
        self.rows += other.rows
        extend_states(self.columns, other.columns)

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield the ratings that nothing reads, and the numbers whose meaning is unknown."""
        unknown = []
        for key, column in self.columns.items():
            meaning = DECLARED_KEYS[key]
            if meaning.is_rating and is_signed(column.values.keys()) and not column.is_class:
                found = f"`{key}` is 1 or -1 in {counted(column.rows, 'row')}, and the answers of {column.negative:,} "
                found += "with -1 are trained on like the others"
                yield Finding("ML668", found, file, "rated answers: prompt, completion and label", severity="error")
            elif self.rows >= FEWEST and key == "label" and self._are_ratings(column):
                effect = "which rates nothing: bad answers are trained on"
                yield letters_finding(sorted(map(str, column.values)), self.rows, file, effect)
            elif column.rows >= FEWEST and (words := column.words(key)):
                unknown.append(words)
        if unknown:
            found = f"beside the text is {', and '.join(unknown)}: no token and no loss shows it"
            yield Finding("ML668", found, file, "rows that are to be trained on alike, or rated answers")

    def _are_ratings(self, column: _Column) -> bool:
        """Return whether the labels of all rows are letters of one rating, some of them bad ones."""
        rating = next(
            (words for words in _RATINGS if column.values.keys() <= {*words} and words[1] in column.values), ()
        )
        return bool(rating) and column.rows == self.rows and 2 * column.classes < column.rows


@dataclass
class CutAnswers:
    """The rows that say that their answer was cut.

    Attributes:
        answers: Number of answers that are trained on at the end of a row.
        cut: Those that were cut.
    """

    answers: int = 0
    cut: SignCount = field(default_factory=SignCount)

    def note(self, record: JudgedRecord) -> None:
        """Add a row; what a pair declares says nothing about one of its sides."""
        row = record.rows[0]
        if len(record.rows) > 1 or not row.kind.counts_as_wanted(row) or not _ends_with_a_trained_answer(row):
            return
        self.answers += 1
        shown = next((f"{key}: {value!r}" for key, value in record.declared if DECLARED_KEYS[key].is_cut(value)), "")
        if shown:
            self.cut.add(record.at, shown, record.place)

    def extend(self, other: CutAnswers) -> None:
        """Add other rows."""
        self.answers += other.answers
        self.cut.extend(other.cut)

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield the cut answers, at the first of them."""
        if self.cut.rows:
            first = self.cut.examples[0]
            detail = "\n".join(f"{example.place}, {example.shown}" for example in self.cut.examples)
            found = (
                f"an answer that was cut, as its row says, in {self.cut.rows:,} of {counted(self.answers, 'answer')}"
            )
            yield Finding("ML669", found, first.place, "whole answers, or rows without these", detail=detail)


class _OfEachRow(WholeFileSign[CutAnswers]):
    """Each row says by itself that its answer was cut."""

    fires_on_sample = True


def _ends_with_a_trained_answer(row: Row) -> bool:
    roles = row.kind.answer_roles
    last = max((index for index, message in enumerate(row.messages) if message["role"] in roles), default=-1)
    return last >= 0 and row.trained_weights()[last] == 1


def letters_finding(labels: Sequence[str], rows: int, file: Place, effect: str) -> Finding:
    """Return the finding of labels that are letters.

    Args:
        labels: The labels.
        rows: The rows that have them.
        file: The file.
        effect: What comes of them.
    """
    found = f"the label of {counted(rows, 'row')} is letters, {' or '.join(map(repr, labels))}, {effect}"
    return Finding("ML668", found, file, "true or false without quotation marks")


DECLARED = WholeFileSign(DeclaredAnswers)
"""How the keys beside the texts of a file rate its answers."""

CUT = _OfEachRow(CutAnswers)
"""Which answers were cut, as the keys beside their texts say."""
