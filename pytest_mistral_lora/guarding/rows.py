"""The rows of batches, as they are judged: each with its place, and the numbers of what was judged."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.errors import counted
from pytest_mistral_lora.guarding.preferences import COLUMNS, sides_of
from pytest_mistral_lora.places import Place

EVALUATION = "eval_batches"
"""The name of the rows of evaluations in node ids, and in places that the datasets do not tell."""

COLUMNS_OF_TEXTS = ("messages", "conversations", *COLUMNS)
"""Keys of the texts of a row beside its ids."""


@dataclass(frozen=True, slots=True)
class GuardedRow:
    """A row of a batch.

    Attributes:
        place: Its place, for findings.
        record: Its ids and labels, as `audit` takes them.
        has_tensors: Whether its batch has tensors of inputs beside its ids, such as the pixels of images.
        count: Number of rows of the dataset in it.
    """

    place: Place
    record: Mapping[str, Any]
    has_tensors: bool = False
    count: int = 1

    def sequences(self) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """Yield ids and labels of each sequence of the row: two for a preference pair."""
        if "input_ids" in self.record:
            yield self.record["input_ids"], self.record.get("labels", ())
        else:
            yield from sides_of(self.record)

    def holds(self, tokens: Collection[int]) -> bool:
        """Return whether one of some tokens is in a sequence of the row."""
        return any(not set(tokens).isdisjoint(ids) for ids, _ in self.sequences())


class RowFigures(NamedTuple):
    """Numbers of what was judged, in one process or in all.

    Attributes:
        rows: Rows of the dataset.
        batches: Batches.
        tokens: Tokens, with padding.
        trained: Those with a loss.
    """

    rows: int
    batches: int
    tokens: int
    trained: int

    def with_more(self, more: RowFigures) -> RowFigures:
        """Return the sums of the numbers of both."""
        return RowFigures(*map(sum, zip(self, more, strict=True)))

    @property
    def words(self) -> str:
        """The numbers of tokens, for a line."""
        share = f"{100 * self.trained / self.tokens:.0f} %" if self.tokens else "0 %"
        return f"{counted(self.tokens, 'token')} with padding, {share} of them with a loss"


@dataclass(frozen=True)
class FirstRows:
    """The rows of the first batches of a run.

    Attributes:
        rows: The rows.
        batches: The number of batches.
        of: The number of rows of the dataset; None if it is unknown.
        watched: Why the rows were taken as the model got them; empty if they were read ahead of the run.
        left_out: Reasons why a part of the run is not judged, by the case of a check.
        sample: The first row of the trainer's dataset, before the collator; empty if it is unknown.
    """

    rows: Sequence[GuardedRow]
    batches: int
    of: int | None = None
    watched: str = ""
    left_out: Mapping[str, str] = field(default_factory=dict)
    sample: Mapping[str, Any] = field(default_factory=dict)

    @property
    def figures(self) -> RowFigures:
        """The numbers of rows, batches and tokens."""
        trained = sum(label != IGNORE_INDEX for label in self.labels)
        return RowFigures(sum(row.count for row in self.rows), self.batches, len(self.labels), trained)

    @cached_property
    def labels(self) -> list[int]:
        """The labels of all rows, with padding."""
        return [label for row in self.rows for _, labels in row.sequences() for label in labels]
