"""The first batches of a training loader, read in a copy of this process: the run reads what it would have read."""

from __future__ import annotations

import pickle
import random
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Integral
from typing import Any, NoReturn

import numpy as np
import torch
from torch.utils.data import IterableDataset
from torch.utils.data._utils import worker as worker_state
from torch.utils.data.dataloader import _DatasetKind  # the loader's own reader: trainers replace it for packed rows

from pytest_mistral_lora.errors import and_more, one_line
from pytest_mistral_lora.guarding.pairing import Record, SourceRow, paired
from pytest_mistral_lora.guarding.preferences import is_preference, preference_records
from pytest_mistral_lora.guarding.process_copy import NoCopyError, run_in_copy
from pytest_mistral_lora.guarding.shared_state import shared_with_copy
from pytest_mistral_lora.guarding.verdict import FirstRows, GuardedRow
from pytest_mistral_lora.places import NamedSource, Place

_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
_PARTS = ("batch_sampler", "sampler", "data_source", "dataset", "collate_fn", "data_collator", "collator")
"""Attributes of loaders, samplers, datasets and collators that lead to other objects with an epoch."""
_SHOWN = 3
TRAIN_DATASET = Place(NamedSource("train_dataset", is_value=True))
"""The place of the rows of a run."""


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """A batch as the model gets it.

    Attributes:
        data: The collated batch.
        sources: The rows of the dataset in it, in the order in which the collator got them; empty for a stream.
    """

    data: Mapping[str, Any]
    sources: tuple[SourceRow, ...] = ()

    def records(self) -> list[Record]:
        """Return the rows of the batch; a flattened batch is one row.

        Returns:
            `input_ids` and `labels` of a row have the same length, with padding.
        """
        if is_preference(self.data, len(self.sources)):
            return preference_records(self.data)
        columns = {name: self.data[name] for name in _COLUMNS if self.data.get(name) is not None}
        ids = columns.get("input_ids")
        if ids is None:
            return []
        if ids.dim() == 1:
            # rows end to end, as the trainer of this package has them
            lengths = self.data["lengths"].tolist() if "lengths" in self.data else [len(ids)]
            parts = {name: [part.tolist() for part in torch.split(values, lengths)] for name, values in columns.items()}
            return [{name: values[row] for name, values in parts.items()} for row in range(len(lengths))]
        mask = columns.get("attention_mask")
        if mask is not None and mask.dim() == 4:
            columns["attention_mask"] = _numbers_of_blocks(mask)
        # position_ids of shape (1, length) may serve every row
        plain = {name: values.expand(len(ids), -1).tolist() for name, values in columns.items() if values.dim() == 2}
        return [{name: values[row] for name, values in plain.items()} for row in range(len(ids))]


def _numbers_of_blocks(mask: torch.Tensor) -> torch.Tensor:
    """Return the conversations that a block mask keeps apart, numbered from 1 on; 0 at padding.

    Args:
        mask: `(batch, 1, length, length)`; true or 0.0 where a token attends, else false or a large negative number.

    Returns:
        `(batch, length)` int64; 0, as at padding, for a token that does not attend to itself.
    """
    attends = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    begins = attends.int().argmax(-1)  # the first token that each token attends to
    is_new = torch.ones_like(begins, dtype=torch.bool)
    is_new[:, 1:] = begins[:, 1:] != begins[:, :-1]
    is_row = attends.diagonal(dim1=-2, dim2=-1)
    return (is_new & is_row).cumsum(-1) * is_row


def rows_of(
    batch: ModelBatch, number: int, dataset: Place = TRAIN_DATASET, batches: str = "batches"
) -> list[GuardedRow]:
    """Return the rows of a batch, each with its place: in the dataset if it is known, else in the batch.

    Args:
        batch: The batch.
        number: Its number, from 0.
        dataset: The place of the dataset.
        batches: The name of its batches, for places.
    """
    rows = paired(batch.records(), batch.sources)
    has_images = batch.data.get("pixel_values") is not None
    return [
        GuardedRow(
            Place(NamedSource(batches, is_value=True), position + 1, split=number)
            if row.index is None
            else replace(dataset, record=row.index + 1),
            row.record,
            has_images,
            row.count,
        )
        for position, row in enumerate(rows)
    ]


def why_watched(loader: Any) -> str:
    """Return why the batches of a loader cannot be read ahead of the run; empty if they can.

    Args:
        loader: The training loader.
    """
    dataset = getattr(loader, "dataset", None)
    if dataset is None or getattr(loader, "batch_sampler", None) is None:
        return "the loader has no dataset with rows by index"
    if isinstance(dataset, IterableDataset):
        return "the dataset is a stream"
    # with several processes, accelerate's first one reads for all
    dispatches = type(loader).__name__ == "DataLoaderDispatcher"
    if dispatches and torch.distributed.is_available() and torch.distributed.is_initialized():
        return "the first process reads for all processes"
    shared = shared_with_copy((dataset, loader.batch_sampler, getattr(loader, "collate_fn", None)))
    return f"the dataset, the sampler or the collator holds {shared}" if shared else ""


def tokenizer_of(collator: Any) -> Any:
    """Return the tokenizer with which a collator pads; None if it has none."""
    inner = getattr(collator, "data_collator", collator)  # that of transformers' RemoveColumnsCollator
    found = (getattr(inner, name, None) for name in ("tokenizer", "processing_class"))
    return next((tokenizer for tokenizer in found if tokenizer is not None), None)


class _ReadError(Exception):
    """An exception of the dataset, the sampler or the collator.

    Attributes:
        error: The exception.
        indices: The rows that were read; None if it is the sampler's, or that of the set-up of a worker.
        is_collators: Whether the rows had been read when it was raised.
    """

    def __init__(self, error: Exception, indices: Any = None, *, is_collators: bool = False) -> None:
        super().__init__(str(error))
        self.error = error
        self.indices = indices
        self.is_collators = is_collators


class RaisedError(Exception):
    """An exception that the run will raise, or that it raises now.

    Attributes:
        error: The exception of the dataset, the sampler or the collator, with its place as a note.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True, slots=True)
class _Failure:
    """The same in another process.

    Attributes:
        error: The pickled exception; None if it does not survive that.
        kind: Its class.
        text: Its message.
        place: The row, or the rows, that were read.
        indices: As for `_ReadError`.
        trace: Its traceback.
    """

    error: bytes | None
    kind: str
    text: str
    place: str
    indices: Any
    trace: str


def size_of(loader: Any) -> int | None:
    """Return the number of rows of a loader's dataset; None if it is a stream or unknown."""
    with suppress(Exception):
        return len(loader.dataset)
    return None


def first_rows(loader: Any, dataset: Any, count: int, *, epoch: int = 0, skipped: int = 0) -> FirstRows:
    """Return the rows of the next batches that a loader will give, read in a copy of this process.

    Args:
        loader: A loader over a dataset with rows by index.
        dataset: The trainer's dataset before unused columns are removed; None if it is unknown.
        count: The number of batches.
        epoch: The epoch of the run, which decides the order of the rows.
        skipped: The batches of the epoch that a resumed run skips.

    Raises:
        NoCopyError: If the batches cannot be read in a copy.
        RaisedError: If the dataset, the sampler or the collator raises an exception.
    """
    size, *batches, last = run_in_copy(lambda: _first_items(loader, dataset, count, epoch, skipped))
    if isinstance(last, _Failure):
        _raise_again(last, loader)
    return FirstRows([row for batch in batches for row in batch], len(batches), size, sample=last)


def _first_items(loader: Any, dataset: Any, count: int, epoch: int, skipped: int) -> Iterator[Any]:
    """Yield the size of the dataset, the rows of each batch, and its first row or an exception that is not ours."""
    yield size_of(loader)
    number = 0
    try:
        for batch in first_batches(loader, dataset, count, epoch=epoch, skipped=skipped):
            yield rows_of(batch, number)
            number += 1
    except _ReadError as failed:
        error = failed.error
        place = _place_of(loader.dataset, failed)
        trace = "".join(traceback.format_exception(error))
        yield _Failure(_pickled(error), type(error).__qualname__, str(error), place, failed.indices, trace)
    else:
        yield _first_row(dataset)


def _first_row(dataset: Any) -> dict[str, Any]:
    """Return the first row of a dataset; empty if it cannot be read, or is nothing that another process can read."""
    try:
        row = dict(dataset[0])
        pickle.dumps(row)
    except Exception:  # an empty dataset, or a fault of the user's own code, which training meets
        return {}
    return row


def first_batches(loader: Any, dataset: Any, count: int, *, epoch: int = 0, skipped: int = 0) -> Iterator[ModelBatch]:
    """Yield the next batches that a loader will give; its samplers, its dataset and its collator go on.

    Args:
        loader: As for `first_rows`.
        dataset: As for `first_rows`.
        count: As for `first_rows`.
        epoch: As for `first_rows`.
        skipped: As for `first_rows`.

    Raises:
        _ReadError: If the dataset, the sampler or the collator raises an exception.
    """
    for place in _places(loader, count, epoch, skipped):
        yield _read(loader, dataset, place)


def _places(loader: Any, count: int, epoch: int, skipped: int) -> Iterator[Any]:
    """Yield the indices of the rows of each batch, with the random states with which the run reads the rows."""
    try:
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        for part in _parts(loader):
            if hasattr(part, "set_epoch") and part is not loader.dataset:
                part.set_epoch(epoch)
        places: Iterator[Any] = islice(iter(loader.batch_sampler), skipped, skipped + count)
        # the loader draws it for its workers, whether it has any or not
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=getattr(loader, "generator", None)))
        if getattr(loader, "num_workers", 0):
            # the run draws the order in its main process
            places = iter(list(places))
            _become_worker(loader, seed)
        while True:
            place = next(places, None)
            if place is None:
                return
            yield place
    except Exception as error:
        raise _ReadError(error) from error


def _become_worker(loader: Any, seed: int) -> None:
    """Set this process up as the first worker of a loader."""
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    given = {"id": 0, "num_workers": loader.num_workers, "seed": seed, "dataset": loader.dataset}
    worker_state._worker_info = worker_state.WorkerInfo(**given)
    if loader.worker_init_fn is not None:
        loader.worker_init_fn(0)


def _read(loader: Any, dataset: Any, indices: Any) -> ModelBatch:
    """Read the rows of a batch, and collate them.

    Raises:
        _ReadError: If the dataset or the collator raises an exception.
    """
    sources: list[SourceRow] = []
    is_read = False
    # a second look at a row may change the next ones
    texts = None if dataset is loader.dataset else dataset

    def collate(items: Any) -> Any:
        nonlocal is_read
        is_read = True
        # before the collator, which may take columns out of the rows
        with suppress(Exception):
            if all(isinstance(index, Integral) for index in indices) and len(items) == len(indices):
                rows = zip(indices, items, strict=True)
                sources.extend(SourceRow.of(int(index), item, texts) for index, item in rows)
        return loader.collate_fn(items)

    kinds: Any = _DatasetKind  # without types
    fetcher = kinds.create_fetcher(kinds.Map, loader.dataset, True, collate, False)
    try:
        return ModelBatch(fetcher.fetch(indices), tuple(sources))
    except Exception as error:
        raise _ReadError(error, indices, is_collators=is_read) from error


def _parts(loader: Any) -> list[Any]:
    """Return the samplers, datasets and collators behind a loader that have attributes, each once."""
    found: dict[int, Any] = {}
    waiting = [getattr(loader, name, None) for name in _PARTS]
    while waiting:
        part = waiting.pop()
        if id(part) in found or not isinstance(getattr(part, "__dict__", None), dict) or isinstance(part, type):
            continue
        found[id(part)] = part
        waiting += [vars(part)[name] for name in _PARTS if name in vars(part)]
    return list(found.values())


def _place_of(dataset: Any, failed: _ReadError) -> str:
    """Return the row that cannot be read; if each can by itself, the rows of the batch."""
    indices = failed.indices
    if indices is None:
        return "the sampler of the training loader"
    shown = ", ".join(f"train_dataset[{index}]" for index in indices[:_SHOWN])
    shown += and_more(_SHOWN, len(indices))
    if failed.is_collators:
        return f"the collator, given {shown}"
    for index in indices:
        try:
            dataset[index]
        except Exception:
            return f"train_dataset[{index}]"
    return f"the dataset, asked for {shown}"


def _pickled(error: Exception) -> bytes | None:
    with suppress(Exception):
        data = pickle.dumps(error)
        if type(pickle.loads(data)) is type(error):
            return data
    return None


def _raise_again(failure: _Failure, loader: Any) -> NoReturn:
    """Raise the exception of the reading process in this one.

    Without workers, the run reads in this process, where more may work than in a copy of it: the rows are read here,
    and if they can be read, the run goes on.

    Raises:
        NoCopyError: If it is an exception of the copy alone, or cannot be brought here.
        RaisedError: With the exception.
    """
    note = f"raised by {failure.place}, which the guard reads before the first step"
    if not getattr(loader, "num_workers", 0) and failure.indices is not None:
        # the state of CUDA says by itself that it is the fork
        if "forked subprocess" not in failure.text:
            try:
                _read(loader, None, failure.indices)
            except _ReadError as failed:
                if type(failed.error).__qualname__ == failure.kind:
                    failed.error.add_note(note)
                    raise RaisedError(failed.error) from failed.error
        raise NoCopyError(f"{failure.place} raised {failure.kind} in a second process: {one_line(failure.text)}")
    if failure.error is None:
        raise NoCopyError(f"{failure.place} raised {failure.kind}: {one_line(failure.text)}")
    crossed: Exception = pickle.loads(failure.error)
    crossed.add_note(note)
    crossed.add_note(failure.trace)
    raise RaisedError(crossed)


@contextmanager
def undisturbed(device: Any) -> Iterator[None]:
    """Restore every random state at the end: of Python, numpy, torch and the device.

    Args:
        device: The device of the run; None if it is unknown.
    """
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module: Any = None
    of_device = None
    if getattr(device, "type", "cpu") not in ("cpu", "meta"):
        with suppress(Exception):  # a device without random states
            module = torch.get_device_module(device)
            of_device = module.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if of_device is not None:
            module.set_rng_state(of_device)
