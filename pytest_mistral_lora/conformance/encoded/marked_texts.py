"""Conversations that were read back from ids and are marked up for another family: text that a template wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.dataset.texts import markup_of
from pytest_mistral_lora.conformance.finding import RULES, Finding, Severity
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place


class _MarkedText(NamedTuple):
    """A text that is marked up for another family.

    Attributes:
        marker: The marker.
        place: The place of the text.
        row: The conversation as one line of JSON.
    """

    marker: str
    place: Place
    row: str


@dataclass
class MarkedTexts:
    """Conversations that were read back.

    With messages, such markers are the row's own, or the comparison shows that a template wrote them.

    Attributes:
        read: Number of conversations.
        marked: Number of those that are marked up for another family.
        first: The first of these that does not ask for it; None without one.
    """

    read: int = 0
    marked: int = 0
    first: _MarkedText | None = None

    def take(self, rows: Sequence[Row]) -> None:
        """Add the conversations of a line."""
        for row in rows:
            # markers are at home in code; a row that cannot be read back has no messages, and a finding of its own
            if not row.kind.is_prose or not row.messages:
                continue
            self.read += 1
            if marked := markup_of(row):
                index, marker, is_asked_for = marked
                self.marked += 1
                if not is_asked_for and self.first is None:
                    self.first = _MarkedText(marker, row.content_place(index), row.to_jsonl())

    def extend(self, other: MarkedTexts) -> None:
        """Add the conversations of later lines."""
        self.read += other.read
        self.marked += other.marked
        self.first = self.first or other.first

    def file_findings(self) -> Iterator[Finding]:
        """Yield the first of them, as an error if all are marked up: a template does it, a few have it of a source."""
        if self.first is None:
            return
        found = f"the text is marked up with {self.first.marker}, as {self.marked:,} of "
        found += f"{counted(self.read, 'conversation')} are"
        severity: Severity = "error" if self.marked == self.read > 1 else RULES["ML584"].severity
        yield Finding("ML584", found, self.first.place, row=self.first.row, severity=severity)
