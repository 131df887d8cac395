"""Lists of integers in a record of encoded rows."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.chat.fields import kind_of
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import Place

Ids = tuple[int, ...]


def read_integers(values: Any, place: Place, *, weights: bool = False, mask: bool = False) -> Ids:
    """Return the integers of a list; of weights, 1 for each that is not 0.

    Args:
        values: The list.
        place: The place of the list, for errors.
        weights: Whether the values are weights, which may be floats.
        mask: Whether the values are a mask, which may have truth values, or 0.0 and 1.0.

    Raises:
        RowError: If the values are not a list of integers.
    """
    if not isinstance(values, list):
        found = "is missing" if values is None else f"is {kind_of(values)}"
        raise RowError(found, place=place, expected="a list of integers")
    kinds = (int, float) if weights else (int,)
    if not weights and {*map(type, values)} <= {int}:
        return tuple(values)
    for index, value in enumerate(values):
        # not isinstance: True is an int in Python, but not an id
        if type(value) not in kinds and not (mask and type(value) in (bool, float) and value in (0, 1)):
            raise RowError(f"{value!r:.80}", place=place / index, expected="an integer")
    if mask:
        return tuple(map(int, values))
    return tuple(int(value != 0) for value in values) if weights else tuple(values)
