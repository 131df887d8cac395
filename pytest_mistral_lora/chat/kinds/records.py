"""Read a record of any kind: how it shows its kind, the rows that it stands for, and the one that is trained on.

Everything that reads rows takes the rows of a record, and asks `row.kind` what it needs to know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pytest_mistral_lora.chat.chunks.registry import blocks_in
from pytest_mistral_lora.chat.kinds.conversation import CONVERSATION
from pytest_mistral_lora.chat.kinds.registry import KINDS
from pytest_mistral_lora.chat.remedies import media_step
from pytest_mistral_lora.chat.rows import RecordKind, Row, imported
from pytest_mistral_lora.errors import RowError, UncheckedRowError
from pytest_mistral_lora.places import NOWHERE, Place


def record_kind(data: Any) -> RecordKind:
    """Return the kind of a record; a conversation if no kind is shown, so that its check names the fault."""
    return shown_kind(data) or CONVERSATION


def shown_kind(data: Any) -> RecordKind | None:
    """Return the kind that a record shows by its keys; None for a conversation, and for a record that shows none."""
    # messages come first: most records have them, and their other keys are the user's own
    if not isinstance(data, Mapping) or data.get("messages") is not None:
        return None
    return next((kind for kind in KINDS.values() if kind is not CONVERSATION and kind.claims(data)), None)


def parse_rows(data: Any, *, place: Place = NOWHERE) -> tuple[Row, ...]:
    """Read a record of any kind, and return the rows that it stands for; see `parse_as`.

    Raises:
        RowError: With the field and the value, if the record is no row of any kind.
    """
    return parse_as(record_kind(data), data, place)


def parse_as(kind: RecordKind, data: Any, place: Place = NOWHERE) -> tuple[Row, ...]:
    """Read a record of a kind, and return the rows that it stands for.

    Each reader of rows asks this function. It converts the names of roles and fields that other programs have, which
    change no token, and says so in the rows.

    Raises:
        RowError: With the field and the value, if the record is faulty, or has what a row cannot keep.
    """
    try:
        return kind.parse(data, place)
    except RowError as error:
        if isinstance(error, UncheckedRowError) or not kind.conversion or not isinstance(data, Mapping):
            raise
        try:
            converted, changes = imported(kind.conversion)(data, kind.keys, place)
        except RowError as refusal:
            # of one field, the check of our form says more
            says_more = not isinstance(refusal, UncheckedRowError) and refusal.place in (error.place, place)
            raise (error if says_more else refusal) from None
        return tuple(replace(row, converted=changes) for row in kind.parse(converted, place))


def prompt_kind(data: Mapping[str, Any]) -> RecordKind | None:
    """Return the kind of a record without its answer, which a model is to continue; None if no kind claims it."""
    return next((kind for kind in KINDS.values() if kind.claims_prompt(data)), None)


def kind_of_side(side: str) -> RecordKind:
    """Return the kind that has a side of a name."""
    return next(kind for kind in KINDS.values() if side in kind.sides)


def as_side(row: Row, side: str) -> Row:
    """Return a row as a side of a record: of the kind that has a side of that name."""
    return replace(row, side=side, kind=kind_of_side(side))


def trained_row(rows: tuple[Row, ...]) -> Row:
    """Return the row of a record that is trained on.

    Raises:
        UncheckedRowError: If the row has an image, or another input that is not trained on here.
        RowError: With the way out, if the record has a kind that is not trained on here.
    """
    row = _row_of_one_answer(rows)
    for chunk, kind in blocks_in(message.get("content") for message in row.messages):
        raise UncheckedRowError(
            f"a row with {kind.shown(chunk)}, on which nothing is trained here",
            reason=f"{kind.title} in a row to train on",
            place=row.place,
            expected="rows of text",
            next_step=media_step(row.place),
        )
    return row


def _row_of_one_answer(rows: tuple[Row, ...]) -> Row:
    row = rows[0]
    if row.kind.is_trained:
        return row
    place = row.place.row
    raise RowError(
        f"this is {row.kind.title}",
        place=place,
        expected="a row with one answer to train on",
        next_step=row.kind.otherwise(place),
    )


def parse_trained(data: Any, *, place: Place = NOWHERE) -> Row:
    """Check a record of any kind, and return its row that is trained on.

    Raises:
        RowError: As for `parse_rows`, and with the way out, if the record has a kind that is not trained on here.
    """
    return _row_of_one_answer(parse_rows(data, place=place))


def as_row(row: Row | Mapping[str, Any]) -> Row:
    """Return a `Row` for a row given as a `Row`, or as plain JSON data of a kind that is trained on.

    Raises:
        RowError: If the data is not a row.
    """
    return row if isinstance(row, Row) else parse_trained(row)
