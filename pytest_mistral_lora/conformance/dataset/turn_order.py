"""Messages that mistral-common accepts where other templates refuse them: what it makes of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.row_pass import JudgedFiles, JudgedRecord


@dataclass
class NoState:
    """The state of rules on one row."""

    def extend(self, other: NoState) -> None:
        """Add the state of other rows."""


class TurnOrder:
    """ML677: the system prompt stands before its user message. ML678: a conversation begins with the user."""

    case = "turns-stay-apart"
    fires_on_sample = False

    def start(self) -> NoState:
        """Return the state of no row."""
        return NoState()

    def observe(self, record: JudgedRecord, state: NoState) -> Iterator[Finding]:
        """Yield a note for each message that mistral-common encodes at another place, or behind no question."""
        row, spans = record.rows[0], record.layouts[0].spans
        if record.origin != "written" or not row.kind.is_chat or not spans:
            return
        roles = [message["role"] for message in row.messages]
        place = row.place / "messages"
        # a tokenizer with a turn for the system prompt leaves it at its place
        if all(span.role != "system" for span in spans):
            for index, pair in enumerate(pairwise(roles), start=1):
                if pair == ("user", "system"):
                    found = "a system prompt straight after a user message, before which mistral-common writes it"
                    yield Finding("ML677", found, place.within(index, "role"), "the system prompt first")
        if next((role for role in roles if role != "system"), "") == "assistant":
            first = next(span for span in spans if span.role not in (None, "system"))
            made = "writes an empty user turn before it" if first.role == "user" else "writes it behind no question"
            found = f"the conversation begins with an answer: mistral-common {made}"
            yield Finding("ML678", found, place / roles.index("assistant"), "a user message first")

    def report(self, state: NoState, files: JudgedFiles) -> Iterator[Finding]:
        """Yield nothing: each finding is of one row."""
        return iter(())


TURN_ORDER = TurnOrder()
"""Messages at places where other templates refuse them."""
