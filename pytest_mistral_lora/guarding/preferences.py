"""The rows of a batch of a preference trainer: answers with their prompt, as collators lay them out.

- DPO: twice as many rows as records, first the chosen sides, then the rejected ones; `completion_mask` is 1 on answers;
- KTO: a row a record, with a `completion_mask` and a `label`; the rows under `KL_input_ids`, which have the answers of
  other records on purpose, are left out;
- reward models: as DPO, without a mask: the conversation is scored as a whole;
- ORPO and CPO: `chosen_input_ids`, `chosen_labels` and so on, padded each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.preference import CHOSEN, REJECTED

Record = dict[str, Any]

COLUMNS = ("prompt", "chosen", "rejected", "completion", "tools")
"""Columns of a dataset with the messages of a preference record."""

_SIDES = (CHOSEN, REJECTED)
_ALONE = "completion"


def is_preference(data: Mapping[str, Any], count: int) -> bool:
    """Return whether a batch is one of a preference trainer.

    Args:
        data: The collated batch.
        count: The number of records in it; 0 if it is unknown.
    """
    if "chosen_labels" in data:
        return True
    ids = data.get("input_ids")
    if ids is None or ids.dim() != 2 or data.get("labels") is not None:
        return False
    has_two_sides = len(ids) == 2 * count
    return has_two_sides or (data.get("completion_mask") is not None and "label" in data)


def preference_records(data: Mapping[str, Any]) -> list[Record]:
    """Return the records of a batch of a preference trainer, as `audit` takes them.

    Args:
        data: The collated batch, one for which `is_preference` is true.

    Returns:
        For each record and each of its answers the ids with the prompt (`chosen_input_ids`), and of the same length the
        `chosen_attention_mask` and, but for a reward model, the `chosen_labels`. For KTO the names begin with
        `completion`, and a `label` is beside them.
    """
    if "chosen_labels" in data:
        names = [f"{side}_{part}" for side in _SIDES for part in ("input_ids", "labels", "attention_mask")]
        columns = {name: data[name].tolist() for name in names if name in data}
        return [{name: values[row] for name, values in columns.items()} for row in range(len(data["chosen_labels"]))]
    ids = data["input_ids"]
    columns = {"input_ids": ids.tolist(), "attention_mask": data["attention_mask"].tolist()}
    if data.get("completion_mask") is not None:
        columns["labels"] = ids.masked_fill(data["completion_mask"] == 0, IGNORE_INDEX).tolist()
    if "label" in data:
        wanted = data["label"].tolist()
        return [{**_side(columns, _ALONE, row), "label": bool(wanted[row])} for row in range(len(ids))]
    half = len(ids) // 2
    return [_side(columns, "chosen", row) | _side(columns, "rejected", half + row) for row in range(half)]


def _side(columns: Mapping[str, list[list[int]]], name: str, row: int) -> Record:
    return {f"{name}_{column}": values[row] for column, values in columns.items()}


def sides_of(record: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ids and labels of each answer of a record; the ids of a reward model are its labels."""
    for name in (*_SIDES, _ALONE):
        ids = record.get(f"{name}_input_ids")
        if ids is not None:
            yield ids, record.get(f"{name}_labels", ids)


@dataclass(frozen=True, slots=True)
class BatchSides:
    """Which side each row of a batch of DPO or KTO is.

    Attributes:
        are_wanted: Whether the row has the chosen or a desirable answer, `(rows,)` bool.
        are_paired: Whether the first half of the rows are the chosen sides, and the second half the rejected ones.
    """

    are_wanted: torch.Tensor
    are_paired: bool

    @classmethod
    def of(cls, data: Any) -> Self | None:
        """Return those of a collated batch; None if it has no `completion_mask`."""
        if data.get("completion_mask") is None:
            return None
        if "label" in data:
            return cls(data["label"].detach().to("cpu", copy=True).bool(), are_paired=False)
        rows = len(data["completion_mask"])
        return cls(torch.arange(rows) < rows // 2, are_paired=True)

    @property
    def names(self) -> tuple[str, str]:
        """What the answers are called that are to gain, and those that are to lose."""
        return _SIDES if self.are_paired else ("desirable", "undesirable")

    def row(self, number: int) -> str:
        """Return a row in words: its record, and which of the answers it has."""
        record = number % (len(self.are_wanted) // 2) if self.are_paired else number
        return f"row {record}, the {self.names[not self.are_wanted[number]]} answer"

    def beyond(self, mask: torch.Tensor) -> torch.Tensor:
        """Return which tokens are beyond the length of the shorter answer of their pair, `(rows, length)` bool.

        Args:
            mask: 1 for tokens of answers, `(rows, length)`.
        """
        predicted = torch.nn.functional.pad(mask[:, 1:], (1, 0))  # nothing predicts the first token of a row
        shared = predicted.sum(1).reshape(2, -1).amin(0).repeat(2)
        return (predicted.cumsum(1) > shared[:, None]) & (mask != 0)
