"""A fault of an encoded row, before it becomes a finding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncodingFault:
    """A broken rule of a row or a line, before it becomes a finding with a place.

    Attributes:
        rule: Id of the rule.
        found: The value or tokens that break it.
        expected: The value that satisfies it; empty if the rule's title is enough.
        fix: The way to mend this cause; empty for the rule's own.
    """

    rule: str
    found: str
    expected: str = ""
    fix: str = ""
