"""The rows of an epoch, judged before the first step as the model will get them, as long as there is time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import blake2b

import numpy as np
from tqdm import tqdm

from pytest_mistral_lora.chat.reading.row_source import SourceRecord
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.errors import one_line
from pytest_mistral_lora.formats.row_sources import ListedRows
from pytest_mistral_lora.guarding.batches import ModelBatch, RaisedError, rows_of
from pytest_mistral_lora.guarding.rows import COLUMNS_OF_TEXTS, FirstRows, GuardedRow, RowFigures
from pytest_mistral_lora.places import NamedSource, Place

SECONDS = 10.0
"""How long the batches behind the first ones are made and judged before the first step."""

_BAR_AFTER = 1.0
"""Seconds after which a bar shows the progress."""


class EpochRows:
    """The rows of the first batches and of those behind them: a `RowSource` that is read once.

    Attributes:
        place: As for `RowSource`.
        figures: The numbers of what was judged behind the first batches, so far.
        reason: Why this ended before the epoch did; empty if it did not.
    """

    is_repeatable = False
    is_sample = True

    def __init__(
        self,
        name: str,
        first: FirstRows,
        rest: Iterable[ModelBatch] = (),
        judged: Callable[[FirstRows], FirstRows] = lambda read: read,
        *,
        is_shown: bool = False,
    ) -> None:
        """Take the batches.

        Args:
            name: The name of the batches, for places.
            first: The rows of the first batches that can be judged.
            rest: The batches behind them.
            judged: Returns the rows that can be judged.
            is_shown: Whether a bar shows the progress.
        """
        self.place: Place = Place(NamedSource(name, is_value=True))
        self.figures: RowFigures = RowFigures(0, 0, 0, 0)
        self.reason: str = ""
        self._first, self._rest, self._judged = first, rest, judged
        self._is_shown = is_shown
        self._places: dict[bytes, Place] = {}

    def records(self, progress: Callable[[int], None] = lambda read: None) -> Iterator[SourceRecord]:
        """Yield the records; see `RowSource.records`."""
        # batches come in the order of a sampler, and findings in that of the dataset
        yield from self._records(sorted(self._first.rows, key=lambda row: row.place.order))
        ends = time.monotonic() + SECONDS
        bar = tqdm(
            self._rest,
            desc="mistral guard judges the rows",
            unit=" batches",
            delay=_BAR_AFTER,
            leave=False,
            disable=not self._is_shown,
        )
        with bar:
            try:
                for number, batch in enumerate(bar, start=self._first.batches):
                    read = self._judged(FirstRows(rows_of(batch, number), 1))
                    self.figures = self.figures.with_more(read.figures)
                    yield from self._records(read.rows)
                    if time.monotonic() > ends:
                        self.reason = f"the time for them, {SECONDS:.0f} s, is over"
                        break
            except RaisedError as raised:  # the run will raise it if it comes so far
                error = raised.error
                notes = "; ".join(getattr(error, "__notes__", ()))
                self.reason = one_line(f"{type(error).__name__}: {error}; {notes}")

    def _records(self, rows: Sequence[GuardedRow]) -> Iterator[SourceRecord]:
        # messages of a table have null in place of absent keys
        is_padded = any(key in row.record for row in rows for key in COLUMNS_OF_TEXTS)
        for row in rows:
            self._places.setdefault(_digest(row), row.place)
        yield from ListedRows(self.place, [(row.place, row.record) for row in rows], is_padded).records()

    def also_trained_on(self, evaluation: FirstRows) -> Result:
        """Return the rows of evaluations that are among these, whole: after these were read."""
        pairs = [(row.place, self._places.get(_digest(row))) for row in evaluation.rows]
        again = [(place, trained) for place, trained in pairs if trained is not None]
        facts = (("rows", len(pairs)), ("compared with", len(self._places)))
        if not again:
            return Result(facts=facts)
        (place, trained), *_ = again
        finding = Finding("ML611", "the row is also trained on", place, others=(trained,), more=len(again) - 1)
        return Result((finding,), facts=facts)


def _digest(row: GuardedRow) -> bytes:
    """Return the same bytes for rows with the same ids, without padding."""
    digest = blake2b(digest_size=16)
    for ids, _ in row.sequences():
        mask = row.record.get("attention_mask")
        tokens = np.asarray(ids, dtype=np.int64)
        if mask is not None and len(mask) == len(tokens):
            tokens = tokens[np.asarray(mask) != 0]
        digest.update(tokens.tobytes() + b"|")
    return digest.digest()
