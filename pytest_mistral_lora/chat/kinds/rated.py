"""Rated answers: an answer to a prompt, with a label that says whether it is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from pytest_mistral_lora.chat.kinds.preference import SETTINGS, UNWANTED, WANTED, Preference, is_list
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.places import NOWHERE, Place


class Rated(Preference):
    """A rated answer: one row."""

    name = "unpaired"
    title = row_title = "a rated answer"
    importable = f"{__name__}:RATED"
    keys = ("prompt", "completion", "label", *SETTINGS)
    order = 20
    tasks = "rated"
    sides = (WANTED, UNWANTED)
    loss = "unwanted"
    trainers = "KTOTrainer"

    def claims(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record has the keys, the lists and the label of a rated answer."""
        has_lists = all(is_list(record.get(key)) for key in ("prompt", "completion"))
        return has_lists and isinstance(record.get("label"), bool)

    def parse(self, data: Any, place: Place = NOWHERE) -> tuple[Row, ...]:
        """Check a rated answer, and return its row.

        Raises:
            RowError: With the field and the value, if it is faulty.
        """
        return (self.row_of(data, "completion", WANTED if data["label"] else UNWANTED, place, place),)

    def of_pair(self, rows: Sequence[Row]) -> list[Row]:
        """Return the sides of a pair as rated answers: the chosen one is wanted, and the rejected one is not."""
        sides = [WANTED if row.kind.counts_as_wanted(row) else UNWANTED for row in rows]
        return [replace(row, side=side, kind=self) for row, side in zip(rows, sides, strict=True)]

    def counts_as_wanted(self, row: Row) -> bool:
        """Return whether the answer has the label true."""
        return row.side == WANTED

    def answer_key(self, row: Row) -> str:
        """Return the key of every rated answer."""
        return "completion"

    def answer_json(self, row: Row) -> dict[str, Any]:
        """Return the answer with its label."""
        return {**super().answer_json(row), "label": self.counts_as_wanted(row)}


RATED = Rated()
