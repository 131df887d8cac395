"""Preference pairs: an answer that is chosen, and one that is rejected, to one prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_mistral_lora.chat.kinds.preference import CHOSEN, REJECTED, SETTINGS, Preference, is_list
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.places import NOWHERE, Place


class Pair(Preference):
    """A preference pair: two rows with one prompt."""

    name = "pair"
    title = row_title = "a preference pair"
    importable = f"{__name__}:PAIR"
    keys = ("prompt", CHOSEN, REJECTED, *SETTINGS)
    order = 10
    tasks = "pairs"
    sides = (CHOSEN, REJECTED)
    loss = "rejected"
    trainers = "DPOTrainer"

    def claims(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record has the keys and the lists of a pair."""
        return all(is_list(record.get(key)) for key in ("prompt", CHOSEN, REJECTED))

    def parse(self, data: Any, place: Place = NOWHERE) -> tuple[Row, ...]:
        """Check a pair, and return the rows of both sides; their places end with the side.

        Raises:
            RowError: With the field and the value, if it is faulty.
        """
        return tuple(self.row_of(data, key, key, place, place / key) for key in (CHOSEN, REJECTED))

    def starts_record(self, row: Row) -> bool:
        """Return whether a row is the chosen side."""
        return row.side == CHOSEN

    def counts_as_wanted(self, row: Row) -> bool:
        """Return whether a row is the chosen side."""
        return row.side == CHOSEN

    def side_part(self, row: Row) -> tuple[str, ...]:
        """Return the side."""
        return (row.side,)

    def answer_key(self, row: Row) -> str:
        """Return the side, which is the key of its answer."""
        return row.side


PAIR = Pair()
