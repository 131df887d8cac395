"""The kinds of rows: how a record shows its kind, and the rows that it stands for.

A new kind is a `RowKind` in `ROW_KINDS`: everything that reads rows takes the rows of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.chat.rows import Row, parse_row


@dataclass(frozen=True, slots=True)
class RowKind:
    """A kind of row.

    Attributes:
        name: Its name.
        title: Its name in sentences.
        is_shown_by: Returns whether a record without `messages` is of this kind, by its keys and their types.
        parse: Checks a record of this kind with its place, and returns the rows that it stands for, at least one.
            Raises RowError with the field and the value if the record is faulty.
    """

    name: str
    title: str
    is_shown_by: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Any, str], tuple[Row, ...]]


def _parse_conversation(data: Any, place: str) -> tuple[Row, ...]:
    return (parse_row(data, place=place),)


CONVERSATION = RowKind("conversation", "a conversation", lambda record: "messages" in record, _parse_conversation)

ROW_KINDS: Mapping[str, RowKind] = {kind.name: kind for kind in (CONVERSATION,)}
"""The kinds of rows, by name."""


def record_kind(data: Any) -> RowKind:
    """Return the kind of a record; a conversation if no kind is shown, so that its check names the fault."""
    # messages come first: most records have them, and their other keys are the user's own
    if isinstance(data, Mapping) and data.get("messages") is None:
        return next((kind for kind in ROW_KINDS.values() if kind.is_shown_by(data)), CONVERSATION)
    return CONVERSATION


def parse_rows(data: Any, *, place: str = "") -> tuple[Row, ...]:
    """Check a record of any kind, and return the rows that it stands for.

    Raises:
        RowError: With the field and the value, if the record is no row of any kind.
    """
    return record_kind(data).parse(data, place)
