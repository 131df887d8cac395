"""The rows of an optimizer step: their choice, their micro-batches, and their packing without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX


class StepSampler(Sampler[list[int]]):
    """For each optimizer step, the rows of one process; together the processes have every row once.

    The seed and the step's number decide, whatever the number of processes. The last step of an epoch has the remaining
    rows; no row is repeated to fill it.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        process: int = 0,
        processes: int = 1,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        """Make a sampler.

        Args:
            rows: Rows in the dataset.
            batch_size: Rows of a step, over all processes.
            process: Number of this process.
            processes: Number of processes.
            seed: Decides the order, anew in each epoch; None for the order of the dataset.
            epoch: Returns the number of the epoch that begins.
        """
        self._rows, self._batch_size = rows, batch_size
        self._process, self._processes = process, processes
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return -(-self._rows // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of each step of the epoch that begins: their places in the dataset."""
        order = np.arange(self._rows)
        if self._seed is not None:
            # seeded by epoch, so that a resumed run needs no state of the sampler
            order = np.random.default_rng((self._seed, self._epoch())).permutation(self._rows)
        for start in range(0, self._rows, self._batch_size):
            yield order[start : start + self._batch_size][self._process :: self._processes].tolist()


@dataclass(frozen=True)
class StepRow:
    """One row of a step, as tensors on the CPU.

    Attributes:
        index: Its place in the dataset.
        input_ids: `(tokens,)` int64.
        labels: `(tokens,)` int64; `IGNORE_INDEX` at tokens without loss.
    """

    index: int
    input_ids: torch.Tensor
    labels: torch.Tensor

    @cached_property
    def targets(self) -> torch.Tensor:
        """The places of the supervised tokens, `(supervised tokens,)` int64. Nothing predicts the first token."""
        return (self.labels[1:] != IGNORE_INDEX).nonzero().squeeze(1) + 1

    @cached_property
    def num_input_tokens(self) -> int:
        """Number of tokens before the last supervised one; that token and later ones change no loss."""
        targets = self.targets
        return int(targets[-1]) if len(targets) else 0


class Segment(NamedTuple):
    """A run of packed tokens that attend to one another, and to a prefix that they share with other segments.

    Attributes:
        start: Its first token.
        end: The token after its last.
        prefix: First token of the prefix and the token after its last; equal numbers without a prefix.
    """

    start: int
    end: int
    prefix: tuple[int, int] = (0, 0)

    @property
    def seen(self) -> int:
        """Number of tokens that its last token sees, itself included."""
        return self.end - self.start + self.prefix[1] - self.prefix[0]


_LEAST_SHARED = 16
"""Shortest prefix worth sharing: each row that continues a prefix attends to it with a separate mask."""


@dataclass(frozen=True)
class PrefixGroup:
    """Rows with the same prefix.

    Attributes:
        rows: The rows.
        shared: Number of prefix tokens that are fed once for all rows; 0 for a single row.
    """

    rows: tuple[StepRow, ...]
    shared: int = 0

    @property
    def num_input_tokens(self) -> int:
        """Number of tokens fed for all rows together."""
        return self.shared + sum(row.num_input_tokens - self.shared for row in self.rows)


def prefix_groups(rows: Sequence[StepRow], *, share_prefix: bool) -> list[PrefixGroup]:
    """Return rows in groups with the same prefix, or each in a separate group.

    Args:
        rows: Rows that each have a supervised token.
        share_prefix: Whether to look for common prefixes.
    """
    if not share_prefix:
        return [PrefixGroup((row,)) for row in rows]
    groups: list[PrefixGroup] = []
    # sorted by ids, rows with a long common prefix are neighbours
    for row in sorted(rows, key=lambda row: row.input_ids[: row.num_input_tokens].tolist()):
        last, shared = groups[-1] if groups else PrefixGroup(()), 0
        if last.rows:
            # a shared token must not predict a supervised one: it would belong to one row's loss only
            most = min(int(member.targets[0]) - 1 for member in (*last.rows, row))
            most = min(most, last.shared) if last.shared else most
            same = torch.eq(last.rows[0].input_ids[:most], row.input_ids[:most])
            shared = most if bool(same.all()) else int(same.long().argmin())
        # joining can shorten the prefix of the whole group: join only if fewer tokens are fed
        if shared >= _LEAST_SHARED and shared * len(last.rows) >= last.shared * (len(last.rows) - 1):
            groups[-1] = PrefixGroup((*last.rows, row), shared)
        else:
            groups.append(PrefixGroup((row,)))
    return groups


@dataclass(frozen=True)
class PackedBatch:
    """Packed rows, as a model is called with them; tensors on the CPU.

    Attributes:
        input_ids: `(1, tokens)` int64.
        position_ids: `(1, tokens)` int64; they restart with each row.
        segments: The place of each row, or of its part after a shared prefix.
        loss_positions: The tokens that a supervised one follows, `(supervised tokens,)` int64.
        targets: The id to predict there, `(supervised tokens,)` int64.
        row_indices: The row's place in the dataset, for each supervised token, `(supervised tokens,)` int64.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: tuple[Segment, ...]
    loss_positions: torch.Tensor
    targets: torch.Tensor
    row_indices: torch.Tensor


def pack_rows(rows: Sequence[StepRow], *, share_prefix: bool = False) -> PackedBatch:
    """Pack rows end to end, each up to the last token that a supervised one follows.

    Args:
        rows: Rows that each have a supervised token.
        share_prefix: Whether rows with the same prefix share it.
    """
    pieces: list[tuple[StepRow, int, int]] = []  # a row, the first of its tokens, and the one after the last
    segments: list[Segment] = []
    loss_positions: list[torch.Tensor] = []
    order: list[StepRow] = []
    place = 0
    for group in prefix_groups(rows, share_prefix=share_prefix):
        prefix = (place, place + group.shared)
        if group.shared:
            pieces.append((group.rows[0], 0, group.shared))
            segments.append(Segment(*prefix))
            place += group.shared
        for row in group.rows:
            pieces.append((row, group.shared, row.num_input_tokens))
            segments.append(Segment(place, place + row.num_input_tokens - group.shared, prefix))
            loss_positions.append(row.targets - 1 - group.shared + place)
            order.append(row)
            place += row.num_input_tokens - group.shared
    return PackedBatch(
        torch.cat([row.input_ids[start:end] for row, start, end in pieces])[None],
        torch.cat([torch.arange(start, end) for _, start, end in pieces])[None],
        tuple(segments),
        torch.cat(loss_positions),
        torch.cat([row.labels[row.targets] for row in order]),
        torch.cat([torch.full_like(row.targets, row.index) for row in order]),
    )


def micro_batches(rows: Sequence[StepRow], most_tokens: int, *, share_prefix: bool = False) -> list[list[StepRow]]:
    """Return rows in micro-batches of at most this many input tokens; a longer row gets its own micro-batch.

    Rows without a supervised token are left out: they have no loss.

    Args:
        rows: Rows of a step.
        most_tokens: Most tokens to be fed at once.
        share_prefix: Whether rows with the same prefix are fed together, and their prefix once.
    """
    supervised = [row for row in rows if row.num_input_tokens]
    fitting: list[PrefixGroup] = []
    for group in prefix_groups(supervised, share_prefix=share_prefix):
        members: list[StepRow] = []
        for row in group.rows:
            if members and PrefixGroup((*members, row), group.shared).num_input_tokens > most_tokens:
                fitting.append(PrefixGroup(tuple(members), group.shared))
                members = []
            members.append(row)
        fitting.append(PrefixGroup(tuple(members), group.shared))
    batches: list[list[StepRow]] = []
    room: list[int] = []
    # first fit, the longest first: at most 11/9 of the fewest micro-batches (Johnson 1973)
    for group in sorted(fitting, key=lambda group: -group.num_input_tokens):
        place = next((place for place, left in enumerate(room) if left >= group.num_input_tokens), None)
        if place is None:
            batches.append([*group.rows])
            room.append(most_tokens - group.num_input_tokens)
        else:
            batches[place] += group.rows
            room[place] -= group.num_input_tokens
    return batches
