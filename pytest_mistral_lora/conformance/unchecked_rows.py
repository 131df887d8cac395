"""The rows of a file that are not judged, although they can be read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place


@dataclass
class UncheckedRows:
    """Rows that are not judged, by the reason; parts of a file merge in any order.

    Attributes:
        counts: Number of rows by reason.
        first: The first of them, by reason: its place as `packed_place` returns it, and the place of the reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, tuple[int, Place]] = field(default_factory=dict)

    def take(self, reason: str, at: int, place: Place) -> None:
        """Note a row.

        Args:
            reason: Why it is not judged.
            at: Its place, as `packed_place` returns it.
            place: The place of the reason.
        """
        self.counts[reason] += 1
        self._note_first(reason, at, place)

    def extend(self, other: UncheckedRows) -> None:
        """Add the rows of another part."""
        self.counts.update(other.counts)
        for reason, (at, place) in other.first.items():
            self._note_first(reason, at, place)

    def _note_first(self, reason: str, at: int, place: Place) -> None:
        if reason not in self.first or at < self.first[reason][0]:
            self.first[reason] = at, place

    @property
    def words(self) -> str:
        """The reasons with the number of their rows, and the place of the first; empty if each row is judged."""
        return "; ".join(
            f"{reason} in {counted(rows, 'row')}: {self.first[reason][1]}"
            for reason, rows in sorted(self.counts.items())
        )
