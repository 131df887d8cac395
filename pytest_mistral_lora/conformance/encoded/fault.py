"""A fault of a row that was encoded, before it becomes a finding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncodingFault:
    """A broken rule of a row or a line, before it becomes a finding with a place.

    Attributes:
        rule: Id of the rule.
        found: The value or tokens that break it.
        expected: The value that keeps it; empty if the rule's title is enough.
    """

    rule: str
    found: str
    expected: str = ""
