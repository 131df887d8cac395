"""The rows of a step in micro-batches: which rows go together, and how they are laid out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pytest_mistral_lora.training.step.prefixes import Group, grouped
from pytest_mistral_lora.training.step.segments import Segment
from pytest_mistral_lora.training.step.step_row import StepRow


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
