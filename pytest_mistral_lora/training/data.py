"""Rows of a recipe: read, split, encoded by the recipe's backend."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row, scan_rows
from pytest_mistral_lora.checkpoint.backends import Encoder, faults
from pytest_mistral_lora.errors import InputError, RowError, RowsError
from pytest_mistral_lora.records.identity import is_held_out
from pytest_mistral_lora.training.recipe import Data, Recipe

_MANY_ROWS = 2000
"""From here on, encoding takes seconds, and a progress bar is shown on a terminal."""


@dataclass(frozen=True)
class Split:
    """Rows with their encoding, in the same order.

    Attributes:
        rows: The rows.
        encoded: What each became.
    """

    rows: tuple[Row, ...]
    encoded: tuple[EncodedRow, ...]

    @property
    def supervised_tokens(self) -> int:
        """How many tokens carry loss in one pass."""
        return sum(row.supervised_tokens for row in self.encoded)


@dataclass(frozen=True)
class RunData:
    """The rows of a run.

    Attributes:
        train: Trained on.
        held_out: Never trained on; may be empty.
    """

    train: Split
    held_out: Split


def load_data(recipe: Recipe, encoder: Encoder) -> RunData:
    """Read, split and encode the rows of a recipe.

    Raises:
        RowsError: Naming every row that cannot be used: unreadable, refused by the backend, without a supervised token,
            or longer than `training.max_length`. No row is dropped or cut.
        InputError: If a split that the recipe asks for is empty.
    """
    errors: list[RowError] = []
    train_rows, held_rows = split_rows(recipe.data, errors)
    splits = []
    for rows in (train_rows, held_rows):
        splits.append(_encode_all(rows, encoder, recipe.training.max_length, errors))
    if errors:
        raise RowsError(errors, place=", ".join(map(str, (*recipe.data.train, *recipe.data.eval))))
    if not splits[0].rows:
        raise InputError("no row is left to train on", place="data.train")
    if recipe.data.held_out and not splits[1].rows:
        raise InputError(
            f"{recipe.data.held_out} of {len(train_rows)} rows holds out none",
            place="data.held_out",
            expected="a larger fraction, more rows, or eval files",
        )
    return RunData(*splits)


def split_rows(data: Data, errors: list[RowError]) -> tuple[list[Row], list[Row]]:
    """Return the training and the held-out rows, in file order; unreadable rows go to `errors`."""
    rows = list(_readable(data.train, errors))
    if not data.held_out:
        return rows, list(_readable(data.eval, errors))
    sides: tuple[list[Row], list[Row]] = ([], [])
    for row in rows:
        sides[is_held_out(row, data.held_out)].append(row)
    return sides


def _readable(paths: Iterable[Path], errors: list[RowError]) -> Iterator[Row]:
    for path in paths:
        found = False
        for item in scan_rows(path):
            found = True
            if isinstance(item, RowError):
                errors.append(item)
            else:
                yield item
        if not found:
            errors.append(RowError("the file has no rows", place=str(path)))


def _encode_all(rows: Sequence[Row], encoder: Encoder, max_length: int, errors: list[RowError]) -> Split:
    kept: list[tuple[Row, EncodedRow]] = []
    for row in _with_progress(rows):
        try:
            encoded = encoder.encode(row)
            for _, fault in faults(encoded, row, max_length):
                raise fault
            kept.append((row, encoded))
        except RowError as error:
            errors.append(error)
    return Split(tuple(row for row, _ in kept), tuple(encoded for _, encoded in kept))


def _with_progress(rows: Sequence[Row]) -> Iterable[Row]:
    if len(rows) < _MANY_ROWS or not sys.stderr.isatty():
        return rows
    from rich.console import Console
    from rich.progress import track

    return track(rows, description="Encoding rows", console=Console(stderr=True))


class RowDataset(Dataset[dict[str, Any]]):
    """Encoded rows as a map-style dataset of `input_ids`, `labels` and `row`, unpadded."""

    def __init__(self, encoded: Sequence[EncodedRow]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._encoded)

    @property
    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Tokens of each row, `(rows,)` int64."""
        return np.array([len(row.input_ids) for row in self._encoded], dtype=np.int64)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row, and its place."""
        row = self._encoded[index]
        return {"input_ids": list(row.input_ids), "labels": list(row.labels or ()), "row": index}
