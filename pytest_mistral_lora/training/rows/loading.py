"""What a recipe's policies did to its rows, said in the log: nothing is dropped or cut in silence."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch.utils.data import Dataset

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.reading.chunks import DataFile, is_long
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import Encoder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.data_stats import Figures, Tally, figures_of
from pytest_mistral_lora.records.hashing import sha256_file
from pytest_mistral_lora.training.devices import is_main, local_rank
from pytest_mistral_lora.training.recipe import Recipe
from pytest_mistral_lora.training.rows.cache import Sink, cache_key, cached, in_memory
from pytest_mistral_lora.training.rows.encoding import Encoded, Plan, encode_files
from pytest_mistral_lora.training.rows.table import EncodedRows, Ints, SourceRows

_log = logging.getLogger(__name__)
_SAID = {
    "too-long": "dropped, longer than training.max_length",
    "nothing-supervised": "dropped, no token is trained on",
    "cut": "cut on the right to training.max_length",
    "without-loss": "kept, though no token is trained on",
}


def warn_of_changes(side: str, tally: Tally, paths: Sequence[Path]) -> None:
    """Log what was dropped and cut, with the places of the first rows; nothing where nothing was.

    Args:
        side: What the rows are called.
        tally: Their figures.
        paths: The data files.
    """
    if not tally.changes:
        return
    lines = [f"{side}: {tally.used} of {tally.rows} rows are used"]
    for change, said in _SAID.items():
        if number := tally.changes[change]:
            places = [f"{paths[file]}:{line}" for file, line in tally.places[change]]
            more = f", and {number - len(places)} more" if number > len(places) else ""
            lines.append(f"  {number} {said}: {', '.join(places)}{more}")
    removed = f"{tally.tokens_removed} tokens, {tally.supervised_tokens_removed} of them with loss"
    _log.warning("\n".join([*lines, f"  removed: {removed}"]))


@dataclass(frozen=True)
class Split:
    """Rows with their encoding, in the same order; of many, each is made when it is asked for.

    Attributes:
        rows: The rows that are used.
        encoded: What each became.
    """

    rows: Sequence[Row]
    encoded: Sequence[EncodedRow]

    @property
    def lengths(self) -> Ints:
        """Tokens of each row, int64."""
        return lengths_of(self.encoded)

    @property
    def supervised_tokens(self) -> int:
        """How many tokens carry loss in one pass."""
        return self.figures.tally.supervised_tokens

    @cached_property
    def figures(self) -> Figures:
        """Hashes and numbers of what is used, and of what was dropped and cut on the way to it."""
        if isinstance(self.encoded, EncodedRows) and isinstance(self.rows, SourceRows):
            return self.encoded.figures
        return figures_of(self.rows, self.encoded)


@dataclass(frozen=True)
class ReadFile:
    """A data file as it was read.

    Attributes:
        path: Where it is.
        held: Whether its rows are held out as a whole.
        sha256: Hash of its bytes.
        rows: Number of its rows, used or not.
    """

    path: Path
    held: bool
    sha256: str
    rows: int


@dataclass(frozen=True)
class RunData:
    """The rows of a run.

    Attributes:
        train: Trained on.
        held_out: Never trained on; may be empty.
        files: The data files, those to train on first.
    """

    train: Split
    held_out: Split
    files: tuple[ReadFile, ...] = ()


def load_data(
    recipe: Recipe, encoder: Encoder, *, processes: int | None = None, progress: TextIO | None = None
) -> RunData:
    """Read, split and encode the rows of a recipe; where there are many, once, and from the cache after that.

    What `training.truncation` and `training.unsupervised` drop and cut is logged as a warning.

    Args:
        recipe: The recipe.
        encoder: Its backend.
        processes: How many processes encode; None for one where there is little to do, else one for each CPU.
        progress: Where a progress bar is drawn if it is a terminal and encoding takes long; None for standard error.

    Raises:
        RowsError: Naming every row that cannot be used: unreadable, refused by the backend, or refused by the
            recipe's policies.
        InputError: If a split that the recipe asks for is empty, or encoded rows cannot be kept.
    """
    files = [DataFile(path, held) for held in (False, True) for path in (recipe.data.train, recipe.data.eval)[held]]
    sha256 = [sha256_file(file.path) for file in files]
    plan = Plan(encoder.tokenizer.path, recipe.backend, recipe.training.policy, recipe.data.held_out)

    def encode(sinks: tuple[Sink, Sink]) -> Encoded:
        return encode_files(
            plan, files, sinks, encoder=encoder, processes=processes, progress=progress or sys.stderr
        )  # fmt: skip

    if is_long(files):
        key = cache_key(plan, encoder, sha256, [file.is_held_out for file in files])
        sides, rows = cached(key, encode, trusted=local_rank() > 0)
    else:
        sides, rows = in_memory(encode)
    paths = [file.path for file in files]
    train, held_out = (
        Split(SourceRows(table, paths), EncodedRows(table, figures)) for table, figures in sides
    )  # fmt: skip
    read = tuple(
        ReadFile(file.path, file.is_held_out, digest, number)
        for file, digest, number in zip(files, sha256, rows, strict=True)
    )
    data = RunData(train, held_out, read)
    if is_main():
        warn_of_changes("rows to train on", train.figures.tally, paths)
        warn_of_changes("held-out rows", held_out.figures.tally, paths)
    _refuse_empty(data, recipe)
    return data


def _refuse_empty(data: RunData, recipe: Recipe) -> None:
    if not data.train.rows:
        raise InputError("no row is left to train on", place="data.train")
    held_out = data.held_out.figures.tally
    if recipe.data.held_out and not held_out.rows:
        rows = data.train.figures.tally.rows
        raise InputError(
            f"{recipe.data.held_out} of {rows} rows holds out none",
            place="data.held_out",
            expected="a larger fraction, more rows, or eval files",
        )
    if held_out.rows and not held_out.used:
        raise InputError(f"each of {held_out.rows} held-out rows is dropped", place="training")


def lengths_of(encoded: Sequence[EncodedRow]) -> Ints:
    """Return the tokens of each row, `(rows,)` int64."""
    if isinstance(encoded, EncodedRows):
        return encoded.table.lengths
    return np.array([len(row.input_ids) for row in encoded], np.int64)


class RowDataset(Dataset[dict[str, Any]]):
    """Encoded rows as a map-style dataset of `input_ids` and `labels`, each `(length,)` int64, and `row`, unpadded."""

    def __init__(self, encoded: Sequence[EncodedRow]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._encoded)

    @property
    def lengths(self) -> Ints:
        """Tokens of each row, `(rows,)` int64."""
        return lengths_of(self._encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row, and its place."""
        if isinstance(self._encoded, EncodedRows):
            ids, labels = self._encoded.table.ids_and_labels(index)
        else:
            row = self._encoded[index]
            ids, labels = np.array(row.input_ids), np.array(row.labels or ())
        return {"input_ids": ids.astype(np.int64), "labels": labels.astype(np.int64), "row": index}
