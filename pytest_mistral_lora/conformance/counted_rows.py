"""The rows of some files that have something in common, in words: those that are not judged, or were converted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import NOWHERE, Place


@dataclass
class CountedRows:
    """Rows by the words for what they have in common; parts of a file merge in any order.

    Attributes:
        counts: Number of rows by these words.
        first: The first of them, by these words: its place as `packed_place` returns it, and the place to show.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, Place]] = field(default_factory=dict)

    def take(self, words: str, at: int, place: Place) -> None:
        """Note a row.

        Args:
            words: What it has in common with others, such as why it is not judged.
            at: Its place, as `packed_place` returns it.
            place: The place to show.
        """
        self.counts[words] += 1
        self._note_first(words, at, place)

    def extend(self, other: CountedRows) -> None:
        """Add the rows of another part."""
        self.counts.update(other.counts)
        for words, (at, place) in other.first.items():
            self._note_first(words, at, place)

    def _note_first(self, words: str, at: int, place: Place) -> None:
        if words not in self.first or at < self.first[words][0]:
            self.first[words] = at, place

    @property
    def first_place(self) -> Place:
        """The place of the first of all rows; `NOWHERE` if there is none."""
        return min(self.first.values(), key=lambda first: first[0], default=(0, NOWHERE))[1]

    @property
    def words(self) -> str:
        """The words with the number of their rows, and the place of the first; empty if there is no row."""
        return "; ".join(
            f"{words} in {counted(rows, 'row')}: {self.first[words][1]}" for words, rows in sorted(self.counts.items())
        )
