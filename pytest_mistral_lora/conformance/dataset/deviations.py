"""Named deviations of a chat template, which rows show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.places import Place


class _Shown(NamedTuple):
    """The rows that show a deviation.

    Attributes:
        rows: Their number.
        at: The place of the first of them, as `packed_place` returns it.
        place: Its place.
    """

    rows: int
    at: int
    place: Place


@dataclass
class Deviations:
    """The named deviations that rows show.

    Attributes:
        by_name: The rows that show each.
    """

    by_name: dict[str, _Shown] = field(default_factory=dict)

    def note(self, name: str, place: Place, at: int, rows: int = 1) -> None:
        """Add rows that show a deviation.

        Args:
            name: Its name.
            place: The place of the first of these rows.
            at: The same place, as `packed_place` returns it.
            rows: Their number.
        """
        before, first_at, first_place = self.by_name.get(name, (0, at, place))
        first = (first_at, first_place) if first_at <= at else (at, place)
        self.by_name[name] = _Shown(before + rows, *first)

    def extend(self, other: Deviations) -> None:
        """Add other rows."""
        for name, (rows, at, place) in other.by_name.items():
            self.note(name, place, at, rows)

    def counts(self) -> dict[str, int]:
        """Return the number of rows that show each, by name."""
        return {name: shown.rows for name, shown in sorted(self.by_name.items())}

    def findings(self) -> Iterator[Finding]:
        """Yield one finding for each, at the first row that shows it, for a run that trains on them."""
        for name, shown in sorted(self.by_name.items()):
            yield Finding("ML604", f"{name} in {counted(shown.rows, 'row')}; the first is here", shown.place)
