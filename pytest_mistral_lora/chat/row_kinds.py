"""The kinds of rows: how a record shows its kind, and the rows that it stands for.

A new kind is a `RowKind` in `ROW_KINDS`: everything that reads rows takes the rows of a record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.chat.fields import FIM_KEYS, ROW_KEYS
from pytest_mistral_lora.chat.fim import is_fim, parse_fim_row
from pytest_mistral_lora.chat.pairs import (
    CHOSEN,
    REJECTED,
    UNWANTED,
    WANTED,
    is_pair,
    is_rated,
    parse_pair,
    parse_rated,
)
from pytest_mistral_lora.chat.remedies import import_command
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import NOWHERE, Place


@dataclass(frozen=True, slots=True)
class RowKind:
    """A kind of row.

    Attributes:
        name: Its name.
        title: Its name in sentences.
        is_shown_by: Returns whether a record without `messages` is of this kind, by its keys and their types.
        parse: Checks a record of this kind with its place, and returns the rows that it stands for, at least one.
            Raises RowError with the field and the value if the record is faulty.
        keys: The keys of a record that decide ids, in order; its other keys are the user's own.
        sides: The sides that its rows can have; empty if its rows are trained on.
        loss: The kind of loss by which `import` makes conversations of its records, if its rows are not trained on.
        trainers: TRL's trainers of such records, if its rows are not trained on.
    """

    name: str
    title: str
    is_shown_by: Callable[[Mapping[str, Any]], bool]
    parse: Callable[[Any, Place], tuple[Row, ...]]
    keys: tuple[str, ...]
    sides: tuple[str, ...] = ()
    loss: str = ""
    trainers: str = ""


def _parse_conversation(data: Any, place: Place) -> tuple[Row, ...]:
    return (parse_row(data, place=place),)


_SETTINGS = tuple(key for key in ROW_KEYS if key != "messages")

CONVERSATION = RowKind(
    "conversation", "a conversation", lambda record: "messages" in record, _parse_conversation, ROW_KEYS
)
PAIR = RowKind(
    "pair",
    "a preference pair",
    is_pair,
    parse_pair,
    ("prompt", "chosen", "rejected", *_SETTINGS),
    (CHOSEN, REJECTED),
    loss="rejected",
    trainers="DPOTrainer",
)
UNPAIRED = RowKind(
    "unpaired",
    "a rated answer",
    is_rated,
    parse_rated,
    ("prompt", "completion", "label", *_SETTINGS),
    (WANTED, UNWANTED),
    loss="unwanted",
    trainers="KTOTrainer",
)
FIM = RowKind("fim", "fill-in-the-middle", is_fim, lambda data, place: (parse_fim_row(data, place=place),), FIM_KEYS)

ROW_KINDS: Mapping[str, RowKind] = {kind.name: kind for kind in (CONVERSATION, PAIR, UNPAIRED, FIM)}
"""The kinds of rows, by name."""


def record_kind(data: Any) -> RowKind:
    """Return the kind of a record; a conversation if no kind is shown, so that its check names the fault."""
    # messages come first: most records have them, and their other keys are the user's own
    if isinstance(data, Mapping) and data.get("messages") is None:
        return next((kind for kind in ROW_KINDS.values() if kind.is_shown_by(data)), CONVERSATION)
    return CONVERSATION


def parse_rows(data: Any, *, place: Place = NOWHERE) -> tuple[Row, ...]:
    """Check a record of any kind, and return the rows that it stands for.

    Raises:
        RowError: With the field and the value, if the record is no row of any kind.
    """
    return record_kind(data).parse(data, place)


def kind_of_row(row: Row) -> RowKind:
    """Return the kind of the record that a row is read from."""
    return next((kind for kind in ROW_KINDS.values() if row.side in kind.sides), CONVERSATION)


def trained_row(rows: tuple[Row, ...]) -> Row:
    """Return the row of a record that is trained on.

    Raises:
        RowError: With the way out, if the record has a kind that is not trained on here.
    """
    row = rows[0]
    kind = kind_of_row(row)
    if not kind.sides:
        return row
    place = row.place.row
    raise RowError(
        f"this is {kind.title}",
        place=place,
        expected="a row with one answer to train on",
        next_step=(
            f"To train on the answers that are wanted: {import_command(place, '--lossy', kind.loss)}, or `lossy: "
            f"[{kind.loss}]` of the source in the recipe. To train on both: TRL's {kind.trainers}, with "
            "pytest_mistral_lora.guard(trainer)."
        ),
    )


def parse_trained(data: Any, *, place: Place = NOWHERE) -> Row:
    """Check a record of any kind, and return its row that is trained on.

    Raises:
        RowError: As for `parse_rows` and `trained_row`.
    """
    return trained_row(parse_rows(data, place=place))


def as_row(row: Row | Mapping[str, Any]) -> Row:
    """Return a `Row` for a row given as a `Row`, or as plain JSON data of a kind that is trained on.

    Raises:
        RowError: If the data is not a row.
    """
    return row if isinstance(row, Row) else parse_trained(row)
