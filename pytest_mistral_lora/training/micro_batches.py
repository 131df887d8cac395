"""The rows of a step in micro-batches: what of each row is fed, which rows go together, how they are laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

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

    @property
    def targets(self) -> torch.Tensor:
        """The places of the supervised tokens, `(supervised tokens,)` int64. The first token follows none."""
        return (self.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1) + 1

    @property
    def fed(self) -> int:
        """How many tokens are fed: those before the last supervised one. What comes later changes no loss."""
        targets = self.targets
        return int(targets[-1]) if len(targets) else 0


@dataclass(frozen=True)
class LaidOut:
    """Rows laid end to end, as a model is called with them; tensors on the CPU.

    Attributes:
        input_ids: `(1, tokens)` int64.
        position_ids: `(1, tokens)` int64; they start again with each row.
        segments: Where each row starts, and where the last one ends.
        columns: The tokens that a supervised one follows, `(supervised tokens,)` int64.
        targets: The id to predict there, `(supervised tokens,)` int64.
        owners: The row's place in the dataset, for each supervised token, `(supervised tokens,)` int64.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[int, ...]
    columns: torch.Tensor
    targets: torch.Tensor
    owners: torch.Tensor


def lay_out(rows: Sequence[StepRow]) -> LaidOut:
    """Lay rows end to end, each up to its last token that a supervised one follows."""
    lengths = [row.fed for row in rows]
    segments = (0, *accumulate(lengths))
    places = [row.targets for row in rows]
    return LaidOut(
        torch.cat([row.input_ids[:length] for row, length in zip(rows, lengths, strict=True)])[None],
        torch.cat([torch.arange(length) for length in lengths])[None],
        segments,
        torch.cat([place - 1 + start for place, start in zip(places, segments, strict=False)]),
        torch.cat([row.labels[place] for row, place in zip(rows, places, strict=True)]),
        torch.cat([torch.full_like(place, row.index) for row, place in zip(rows, places, strict=True)]),
    )


def split(rows: Sequence[StepRow], most_tokens: int) -> list[list[StepRow]]:
    """Divide rows into micro-batches of at most this many fed tokens; a longer row is a micro-batch of its own.

    The longest come first, and each row goes into the first micro-batch that has room. Rows without a supervised token
    are left out: they have no loss.
    """
    parts: list[list[StepRow]] = []
    room: list[int] = []
    for row in sorted((row for row in rows if row.fed), key=lambda row: -row.fed):
        place = next((place for place, left in enumerate(room) if left >= row.fed), None)
        if place is None:
            parts.append([row])
            room.append(most_tokens - row.fed)
        else:
            parts[place].append(row)
            room[place] -= row.fed
    return parts
