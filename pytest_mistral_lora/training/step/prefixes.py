"""Which rows of a micro-batch begin alike, and how much of their beginning they may share.

Sharing is exact within a step: a beginning's keys and values are the same for each of its rows, and its gradient is the
sum of theirs. Between steps it would not be: LoRA changes keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pytest_mistral_lora.training.step.step_row import StepRow

_LEAST = 16
"""Tokens that are worth sharing: each row that goes on from a beginning attends to it with a mask of its own."""


@dataclass(frozen=True)
class Group:
    """Rows that begin with the same tokens.

    Attributes:
        rows: The rows.
        shared: How many tokens of their beginning are fed once; 0 for a row on its own.
    """

    rows: tuple[StepRow, ...]
    shared: int = 0

    @property
    def fed(self) -> int:
        """How many tokens are fed."""
        return self.shared + sum(row.fed - self.shared for row in self.rows)


def grouped(rows: Sequence[StepRow]) -> list[Group]:
    """Return rows in groups that begin alike; a row is added to a group where that feeds less.

    No token that a supervised one follows is shared, so that each row keeps its own losses.
    """
    groups: list[Group] = []
    for row in sorted(rows, key=lambda row: row.input_ids[: row.fed].tolist()):
        last = groups[-1] if groups else None
        shared = _shareable(last, row) if last else 0
        if last and shared >= _LEAST and shared * len(last.rows) >= last.shared * (len(last.rows) - 1):
            groups[-1] = Group((*last.rows, row), shared)
        else:
            groups.append(Group((row,)))
    return groups


def _shareable(group: Group, row: StepRow) -> int:
    """Return how many tokens a group and a row could share."""
    first = group.rows[0]
    most = min(int(one.targets[0]) - 1 for one in (*group.rows, row))
    most = min(most, group.shared) if group.shared else most
    same = torch.eq(first.input_ids[:most], row.input_ids[:most])
    return most if bool(same.all()) else int(same.long().argmin())
