"""Signs that all preference records of a file have: what tells their sides apart without reading them."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.conformance.dataset.file_signs import is_refusal
from pytest_mistral_lora.conformance.dataset.whole_file_sign import FEWEST, WholeFileSign
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedRecord
from pytest_mistral_lora.places import Place

_SHOWN = 60
_LONGEST_BEGINNING = 200
_LABEL, _LABEL_WORDS = 30, 3
"""Most characters and words of a label: two classes may always be right and wrong in one order."""
# a space or a line break, or words up to a mark: a sentence may go on in many ways, as after "It is"; the start of a
# format, such as JSON, a list, a tag or code, is what pairs may teach
_PREFIX = re.compile(
    r"(?![{<#`]|\[[\s\[{\"']|[-*]\s|1\.)(?: (?! )|\n+|\S.{2,}?[^\w\s](?:\s+|(?<=[\u3000-\uff20])))", re.DOTALL
)


@dataclass
class SidesOfPairs:
    """What the chosen answers, and the rejected ones, have in common.

    Attributes:
        pairs: Number of pairs.
        chosen: A checksum of the chosen answer, if all are one text; else 0.
        rejected: The same of the rejected one.
        rejected_text: The beginning of the rejected answers, if all are one text.
        beginning: What all chosen answers begin with.
        shared: Most characters that both answers of a pair begin with.
        are_labels: Whether each answer is as short as a label.
    """

    pairs: int = 0
    chosen: int = 0
    rejected: int = 0
    rejected_text: str = ""
    beginning: str = ""
    shared: int = 0
    are_labels: bool = True

    def note(self, record: JudgedRecord) -> None:
        """Add a pair."""
        if len(record.rows) < 2:
            return
        chosen, rejected = map(_text_of_answer, record.rows)
        beginning = chosen[:_LONGEST_BEGINNING]
        shared = equal_beginning(beginning, rejected)
        are_labels = all(len(text) <= _LABEL and len(text.split()) <= _LABEL_WORDS for text in (chosen, rejected))
        shown = rejected[:_SHOWN]
        self.extend(SidesOfPairs(1, _checksum(chosen), _checksum(rejected), shown, beginning, shared, are_labels))

    def extend(self, other: SidesOfPairs) -> None:
        """Add other pairs."""
        if not other.pairs:
            return
        if not self.pairs:
            self.chosen, self.rejected = other.chosen, other.rejected
            self.rejected_text, self.beginning = other.rejected_text, other.beginning
        self.pairs += other.pairs
        self.chosen = self.chosen if self.chosen == other.chosen else 0
        self.rejected = self.rejected if self.rejected == other.rejected else 0
        self.beginning = self.beginning[: equal_beginning(self.beginning, other.beginning)]
        self.shared = max(self.shared, other.shared)
        self.are_labels = self.are_labels and other.are_labels

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield the findings of both sides; labels, a refusal and the format of an answer are meant."""
        if self.pairs < FEWEST or self.are_labels or self.chosen:
            return
        if self.rejected:
            found = f"the rejected answer of each of {self.pairs:,} pairs is {self.rejected_text!r}"
            yield Finding("ML665", found, file, "rejected answers that differ as the chosen ones do")
            return
        prefix = _PREFIX.match(self.beginning)
        if prefix is None or 2 * self.shared > prefix.end() or is_refusal(self.beginning):
            return
        found = f"each of {self.pairs:,} chosen answers begins with {prefix[0][:_SHOWN]!r}, and no rejected one does"
        yield Finding("ML666", found, file, "answers that differ in what they say")


def _text_of_answer(row: Row) -> str:
    """Return the text of the first message of an answer, or its calls."""
    message = row.kind.answer_part(row).messages[0]
    text = text_of(message.get("content"))
    return text or json.dumps([call["function"] for call in message.get("tool_calls") or ()], sort_keys=True)


def _checksum(text: str) -> int:
    """Return 32 bits for a text, never 0."""
    return zlib.crc32(text.encode(errors="surrogatepass")) or 1


SIDES = WholeFileSign(SidesOfPairs)
"""One text for all rejected sides; one beginning of all chosen sides, and of no rejected one."""


@dataclass
class Ratings:
    """The numbers of rated answers.

    Attributes:
        wanted: Number of wanted ones.
        unwanted: Number of the others.
    """

    wanted: int = 0
    unwanted: int = 0

    def note(self, record: JudgedRecord) -> None:
        """Add a rated answer."""
        row = record.rows[0]
        if not row.kind.sides or len(record.rows) > 1:
            return
        if row.kind.counts_as_wanted(row):
            self.wanted += 1
        else:
            self.unwanted += 1

    def extend(self, other: Ratings) -> None:
        """Add other answers."""
        self.wanted += other.wanted
        self.unwanted += other.unwanted

    def findings(self, file: Place) -> Iterator[Finding]:
        """Yield one finding if all answers are wanted."""
        if self.wanted >= FEWEST and not self.unwanted:
            yield Finding(
                "ML667", f"all {self.wanted:,} rated answers are wanted", file, "unwanted answers beside them"
            )


RATINGS = WholeFileSign(Ratings)
"""Rated answers that are all wanted."""
