"""One row of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX


@dataclass(frozen=True)
class StepRow:
    """One row of a step, as tensors on the CPU.

    Attributes:
        index: Its place in the dataset.
        input_ids: `(tokens,)` int64.
        labels: `(tokens,)` int64.
    """

    index: int
    input_ids: torch.Tensor
    labels: torch.Tensor

    @cached_property
    def targets(self) -> torch.Tensor:
        """The places of the supervised tokens, `(supervised tokens,)` int64. The first token follows none."""
        return (self.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1) + 1

    @cached_property
    def fed(self) -> int:
        """How many tokens are fed: those before the last supervised one. What comes later changes no loss."""
        targets = self.targets
        return int(targets[-1]) if len(targets) else 0


class Segment(NamedTuple):
    """A run of tokens that see themselves, and a beginning that they share with others.

    Attributes:
        start: Its first token.
        end: The token after its last.
        prefix: Where the beginning is that it goes on from; equal numbers for none.
    """

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)

    @property
    def seen(self) -> int:
        """How many tokens its last one sees, itself included."""
        return self.end - self.start + self.prefix[1] - self.prefix[0]


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


@dataclass(frozen=True)
class LaidOut:
    """Rows laid end to end, as a model is called with them; tensors on the CPU.

    Attributes:
        input_ids: `(1, tokens)` int64.
        position_ids: `(1, tokens)` int64; they start again with each row.
        segments: Where each row is, or what is left of it behind a beginning that it shares.
        columns: The tokens that a supervised one follows, `(supervised tokens,)` int64.
        targets: The id to predict there, `(supervised tokens,)` int64.
        owners: The row's place in the dataset, for each supervised token, `(supervised tokens,)` int64.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    columns: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


def lay_out(rows: Sequence[StepRow], *, share_prefix: bool = False) -> LaidOut:
    """Lay rows end to end, each up to its last token that a supervised one follows.

    Args:
        rows: Rows that each have a supervised token.
        share_prefix: Whether rows that begin alike share their beginning.
    """
    pieces: list[tuple[StepRow, int, int]] = []  # a row, and which of its tokens
    segments: list[Segment] = []
    columns: list[torch.Tensor] = []
    order: list[StepRow] = []
    place = 0
    for group in _groups(rows, share_prefix):
        prefix = (place, place + group.shared)
        if group.shared:
            pieces.append((group.rows[0], 0, group.shared))
            segments.append(Segment(*prefix))
            place += group.shared
        for row in group.rows:
            pieces.append((row, group.shared, row.fed))
            segments.append(Segment(place, place + row.fed - group.shared, prefix))
            columns.append(row.targets - 1 - group.shared + place)
            order.append(row)
            place += row.fed - group.shared
    return LaidOut(
        torch.cat([row.input_ids[start:end] for row, start, end in pieces])[None],
        torch.cat([torch.arange(start, end) for _, start, end in pieces])[None],
        tuple(segments),
        torch.cat(columns),
        torch.cat([row.labels[row.targets] for row in order]),
        torch.cat([torch.full_like(row.targets, row.index) for row in order]),
    )


def split(rows: Sequence[StepRow], most_tokens: int, *, share_prefix: bool = False) -> list[list[StepRow]]:
    """Divide rows into micro-batches of at most this many fed tokens; a longer row is a micro-batch of its own.

    The longest come first, and each goes into the first micro-batch that has room. Rows without a supervised token are
    left out: they have no loss.

    Args:
        rows: Rows of a step.
        most_tokens: Most tokens to be fed at once.
        share_prefix: Whether rows that begin alike are fed together, and their beginning once.
    """
    parts: list[list[StepRow]] = []
    room: list[int] = []
    supervised = [row for row in rows if row.fed]
    fitting = [part for group in _groups(supervised, share_prefix) for part in _cut(group, most_tokens)]
    for group in sorted(fitting, key=lambda group: -group.fed):
        place = next((place for place, left in enumerate(room) if left >= group.fed), None)
        if place is None:
            parts.append([*group.rows])
            room.append(most_tokens - group.fed)
        else:
            parts[place] += group.rows
            room[place] -= group.fed
    return parts


def _groups(rows: Sequence[StepRow], share_prefix: bool) -> list[Group]:
    return grouped(rows) if share_prefix else [Group((row,)) for row in rows]


def _cut(group: Group, most_tokens: int) -> Iterator[Group]:
    """Divide a group into groups that fit."""
    rows: list[StepRow] = []
    for row in group.rows:
        if rows and Group((*rows, row), group.shared).fed > most_tokens:
            yield Group(tuple(rows), group.shared)
            rows = []
        rows.append(row)
    yield Group(tuple(rows), group.shared)
