"""Rows laid end to end: where each is."""

from __future__ import annotations

from typing import NamedTuple


class Segment(NamedTuple):
    """A run of tokens that see themselves, and a beginning that they share with others.

    Attributes:
        start: Its first token.
        end: The token after its last.
        prefix: Where the beginning is that it goes on from; equal numbers for none.
    """

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)

    @property
    def seen(self) -> int:
        """How many tokens its last one sees, itself included."""
        return self.end - self.start + self.prefix[1] - self.prefix[0]
