"""What the reports read of a check's outcome and of a cause of findings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pytest_mistral_lora.places import Place


class Outcome(Protocol):
    """The outcome of a check, as a session keeps it."""

    @property
    def target(self) -> str:
        """The name of the check's target."""

    @property
    def subject(self) -> str:
        """The check's subject."""

    @property
    def case(self) -> str:
        """The check's name within target and subject."""

    @property
    def state(self) -> str:
        """A key of `tables.OUTCOMES`."""

    @property
    def not_checked(self) -> str:
        """The reason why something could not be checked; may be empty."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the check measured or was compared with."""


@dataclass(frozen=True, slots=True)
class RecordedOutcome:
    """The outcome of a check in a report that was written.

    Attributes:
        nodeid: The node id of the check.
        target: As for `Outcome`.
        subject: As for `Outcome`.
        case: As for `Outcome`.
        state: As for `Outcome`.
        not_checked: As for `Outcome`.
        facts: As for `Outcome`.
    """

    nodeid: str
    target: str
    subject: str
    case: str
    state: str
    not_checked: str
    facts: Mapping[str, Any]

    @classmethod
    def of(cls, check: Mapping[str, Any]) -> RecordedOutcome:
        """Return the outcome of a check of a report."""
        names = {name: check[name] for name in ("nodeid", "target", "subject", "case", "not_checked", "facts")}
        return cls(**names, state=check["outcome"])


class JudgedOutcome(Outcome, Protocol):
    """The outcome of a check that has a node id."""

    @property
    def nodeid(self) -> str:
        """The node id of the check."""


class Found(Protocol):
    """A finding."""

    @property
    def rule(self) -> str:
        """The id of its rule."""

    @property
    def place(self) -> Place:
        """File, record, message, field or token."""

    @property
    def words(self) -> str:
        """The value, tokens or text that break the rule, with the places of other rows."""

    @property
    def detail(self) -> str:
        """Lines with more."""

    @property
    def next_step(self) -> str:
        """The way to mend the artifact."""


class FoundCause(Protocol):
    """The findings of one cause."""

    @property
    def shown(self) -> Found:
        """The finding that stands for the others."""

    @property
    def count(self) -> int:
        """The number of findings."""
