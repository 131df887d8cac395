"""The number of rows that show a sign, with the first of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from pytest_mistral_lora.places import Place


class SignExample(NamedTuple):
    """A row that shows a sign.

    Attributes:
        at: Its place as `packed_place` returns it.
        shown: The text that shows it; may be empty.
        place: Its place.
    """

    at: int
    shown: str
    place: Place


@dataclass
class SignCount:
    """Rows that show a sign.

    Attributes:
        rows: Their number.
        examples: The first of them.
    """

    MOST: ClassVar = 3
    """Most examples to keep."""

    rows: int = 0
    examples: list[SignExample] = field(default_factory=list)

    def add(self, at: int, shown: str, place: Place) -> None:
        """Add a row that comes after the others."""
        self.rows += 1
        if len(self.examples) < self.MOST:
            self.examples.append(SignExample(at, shown, place))

    def extend(self, other: SignCount) -> None:
        """Add other rows, which may come before or after these."""
        self.rows += other.rows
        self.examples = sorted([*self.examples, *other.examples], key=lambda example: example[:2])[: self.MOST]
