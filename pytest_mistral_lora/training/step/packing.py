"""The rows of an optimizer step: their choice, their micro-batches, and their packing without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.training.rows import Ints

DEALING = "longest first, to the process with the fewest tokens"
"""How the rows of a step are dealt to several processes: a name for the identity of a run."""


class StepSampler(Sampler[list[int]]):
    """For each optimizer step, the rows of one process; together the processes have every row once.

    The seed and the step's number decide the rows of a step, whatever the number of processes. All processes wait for
    the one with the most tokens, so that rows are dealt by length; the loss of a step is a sum over tokens, which the
    deal does not change. The last step of an epoch has the remaining rows; no row is repeated to fill it.
    """

    def __init__(
        self,
        tokens: Ints,
        batch_size: int,
        *,
        process: int = 0,
        processes: int = 1,
        seed: int | None = None,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        """Make a sampler.

        Args:
            tokens: Input tokens of each row in the dataset, `(rows,)`.
            batch_size: Rows of a step, over all processes.
            process: Number of this process.
            processes: Number of processes.
            seed: Decides the order, anew in each epoch; None for the order of the dataset.
            epoch: Returns the number of the epoch that begins.
        """
        self._tokens, self._batch_size = tokens.tolist(), batch_size
        self._process, self._processes = process, processes
        self._seed, self._epoch = seed, epoch

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return -(-len(self._tokens) // self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the rows of this process in each step of the epoch that begins: their places in the dataset."""
        for step in self._steps(self._epoch()):
            yield self._deal(step)[self._process]

    def shares(self, first: int, last: int) -> Iterator[list[int]]:
        """Yield the rows of each process in each step of a run, from step `first` to the one before `last`."""
        for epoch in count(first // len(self)):
            for number, step in enumerate(self._steps(epoch), epoch * len(self)):
                if number >= last:
                    return
                if number >= first:
                    yield from self._deal(step)

    def _steps(self, epoch: int) -> Iterator[list[int]]:
        rows = len(self._tokens)
        order = np.arange(rows)
        if self._seed is not None:
            # seeded by epoch, so that a resumed run needs no state of the sampler
            order = np.random.default_rng((self._seed, epoch)).permutation(rows)
        for start in range(0, rows, self._batch_size):
            yield order[start : start + self._batch_size].tolist()

    def _deal(self, step: list[int]) -> list[list[int]]:
        """Return the rows of each process, in the order of the step."""
        if self._processes == 1:
            return [step]
        dealt: list[list[int]] = [[] for _ in range(self._processes)]
        load = [(0, 0)] * self._processes
        for place in sorted(range(len(step)), key=lambda place: -self._tokens[step[place]]):
            # rows without loss have no tokens: they go to the process with the fewest rows
            process = load.index(min(load))
            dealt[process].append(place)
            tokens, rows = load[process]
            load[process] = (tokens + self._tokens[step[place]], rows + 1)
        return [[step[place] for place in sorted(places)] for places in dealt]


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
    bins = first_fit([group.num_input_tokens for group in fitting], most_tokens)
    return [[row for place in places for row in fitting[place].rows] for places in bins]


def first_fit(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Return the places of sizes, in bins of at most `most` together; a larger size has a bin of its own.

    First fit, the largest first: at most 11/9 of the fewest bins (Johnson 1973).
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        chosen = next((number for number, left in enumerate(room) if left >= sizes[place]), None)
        if chosen is None:
            bins.append([place])
            room.append(most - sizes[place])
        else:
            bins[chosen].append(place)
            room[chosen] -= sizes[place]
    return bins


def fed_tokens(rows: Sequence[StepRow], *, share_prefix: bool) -> int:
    """Return the input tokens that are fed for the rows of a micro-batch."""
    return sum(group.num_input_tokens for group in prefix_groups(rows, share_prefix=share_prefix))
