"""Signs that every row of a file has: one turn that is trained alone, and one length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pytest_mistral_lora.chat.rows import weight_of
from pytest_mistral_lora.conformance.dataset.whole_file_sign import FEWEST, WholeFileSign
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedRecord
from pytest_mistral_lora.places import Place

_NAMES = {-1: "last", 0: "first", 1: "second", 2: "third", -2: "last but one"}
"""The turns in words, by their index from the beginning or the end."""


@dataclass
class TurnsTrainedAlone:
    """The turn that is trained on alone, in conversations of several answers.

    Attributes:
        rows: Number of these.
        turns: The indices, from the beginning and from the end, of the one turn that is trained on in each of them;
            None without a row.
        is_declared: Whether the rows themselves say so, by their weights.
    """

    rows: int = 0
    turns: frozenset[int] | None = None
    is_declared: bool = False

    def note(self, record: JudgedRecord) -> None:
        """Add a conversation; an answer of a preference record stands behind a prompt, which is never trained on."""
        row = record.rows[0]
        # a declared objective says which turns are trained on
        if row.kind.sides or not row.objective.is_default or self.turns == frozenset():
            return
        if sum(message["role"] == "assistant" for message in row.messages) < 2:
            return
        groups = row.assistant_groups()
        if len(groups) < 2:
            return
        trained = [index for index, group in enumerate(groups) if weight_of(row.messages[group[0]])]
        alone = frozenset({trained[0], trained[0] - len(groups)}) if len(trained) == 1 else frozenset[int]()
        self._add(1, alone, is_declared=record.origin == "written")

    def _add(self, rows: int, turns: frozenset[int], *, is_declared: bool) -> None:
        self.rows += rows
        self.turns = turns if self.turns is None else self.turns & turns
        self.is_declared = self.is_declared or is_declared

    def extend(self, other: TurnsTrainedAlone) -> None:
        """Add other conversations."""
        if other.turns is not None:
            self._add(other.rows, other.turns, is_declared=other.is_declared)

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield one finding, unless the rows say by their weights that the last answer alone is trained on."""
        if self.rows < FEWEST or not self.turns:
            return
        turn = next((index for index in _NAMES if index in self.turns), min(self.turns, key=abs))
        if turn == -1 and self.is_declared:
            return
        name = _NAMES.get(turn, f"{abs(turn)}th")
        found = f"the {name} answer alone is trained on in each of {self.rows:,} conversations of several answers"
        yield Finding("ML662", found, file, "labels on each answer")


TURN_ALONE = WholeFileSign(TurnsTrainedAlone)
"""A fixed turn that alone is trained on in every row."""

_FEWEST_LENGTHS = 3
"""Fewest different lengths of answers in rows of one length: a form that is filled in has one or two."""


@dataclass
class LengthsOfRows:
    """The lengths of rows as they are trained on.

    Attributes:
        rows: Number of rows; of packed ones, of sequences.
        length: Their tokens without padding; None if they differ, or the last of them is not EOS.
        answers: Different numbers of tokens that are trained on, at most `_FEWEST_LENGTHS`.
        last: The place of the last row: a packed sequence shows each of its conversations.
    """

    rows: int = 0
    length: int | None = None
    answers: set[int] = field(default_factory=set)
    last: Place | None = None

    def note(self, record: JudgedRecord) -> None:
        """Add a row, or a packed sequence; an answer of a preference record has its own limit."""
        # one that differs decides
        if (self.rows and self.length is None) or record.rows[0].kind.sides or record.place == self.last:
            return
        if record.origin == "written" and not record.is_exact:
            return  # what its ids lack of the messages has a finding
        self.last = record.place
        ids = record.given.ids if record.given is not None else record.trained[0].input_ids
        # each conversation ends with EOS
        is_closed = ids[-1:] == record.layouts[-1].input_ids[-1:]
        self._add(1, len(ids) if is_closed else None, {record.layouts[0].supervised_tokens})

    def _add(self, rows: int, length: int | None, answers: set[int]) -> None:
        self.length = length if not self.rows or length == self.length else None
        self.rows += rows
        if len(self.answers) < _FEWEST_LENGTHS:
            self.answers |= answers

    def extend(self, other: LengthsOfRows) -> None:
        """Add other rows."""
        if other.rows:
            self._add(other.rows, other.length, other.answers)

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield one finding if all rows have one length, although their answers have several."""
        if self.rows >= FEWEST and self.length is not None and len(self.answers) >= _FEWEST_LENGTHS:
            found = f"each of {self.rows:,} rows has {self.length:,} tokens, and the last of them is </s>"
            yield Finding("ML664", found, file, "rows that end where their last answer ends")


ONE_LENGTH = WholeFileSign(LengthsOfRows)
"""Rows that are all as long as the longest, with EOS as their last token."""
