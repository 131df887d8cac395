"""The next batches of a loader, made before the run makes them, and the batches that the model gets."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice
from numbers import Integral
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset
from torch.utils.data.dataloader import _DatasetKind  # the loader's own reader: trainers replace it for packed rows

from pytest_mistral_lora.chat.chunks.registry import block_types
from pytest_mistral_lora.errors import and_more
from pytest_mistral_lora.guarding.pairing import Record, SourceRow, paired
from pytest_mistral_lora.guarding.preferences import is_preference, preference_records
from pytest_mistral_lora.guarding.rows import GuardedRow
from pytest_mistral_lora.places import NamedSource, Place
from pytest_mistral_lora.runners import TRAINERS

_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
_PARTS = ("batch_sampler", "sampler", "data_source", "dataset", "collate_fn", "data_collator", "collator")
"""Attributes of samplers, datasets and collators that lead to other ones."""
_LIBRARIES = frozenset(("accelerate", "datasets", "numpy", "peft", "pytest_mistral_lora", "torch", "transformers"))
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_SHOWN = 3
_DRAWN = 64
"""Batches whose order is drawn at the same time: each time, the random states are kept and put back."""

TRAIN_DATASET = Place(NamedSource("train_dataset", is_value=True))
"""The place of the rows of a run."""


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """A batch as the model gets it.

    Attributes:
        data: The collated batch.
        sources: The rows of the dataset in it, in the order in which the collator got them; empty if unknown.
    """

    data: Mapping[str, Any]
    sources: tuple[SourceRow, ...] = ()

    def is_fed(self, data: Mapping[str, Any]) -> bool:
        """Return whether the model gets this batch: a batch has its ids, labels and masks."""
        columns = {
            name: values
            for name, values in self.data.items()
            if isinstance(values, torch.Tensor) and not values.is_floating_point()
        }
        return len(columns) > 0 and all(
            isinstance(data.get(name), torch.Tensor) and torch.equal(data[name].cpu(), values.cpu())
            for name, values in columns.items()
        )

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
    keys = (key for kind in block_types().values() for key in kind.tensors)
    has_tensors = any(batch.data.get(key) is not None for key in keys)
    return [
        GuardedRow(
            Place(NamedSource(batches, is_value=True), position + 1, split=number)
            if row.index is None
            else replace(dataset, record=row.index + 1),
            row.record,
            has_tensors,
            row.count,
        )
        for position, row in enumerate(rows)
    ]


def tokenizer_of(collator: Any) -> Any:
    """Return the tokenizer with which a collator pads; None if it has none."""
    inner = getattr(collator, "data_collator", collator)  # that of transformers' RemoveColumnsCollator
    found = (getattr(inner, name, None) for name in ("tokenizer", "processing_class"))
    return next((tokenizer for tokenizer in found if tokenizer is not None), None)


class RaisedError(Exception):
    """An exception that the run will raise.

    Attributes:
        error: The exception of the dataset or the collator, with its place as a note.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


class EpochOrder:
    """The indices of the rows of each batch of an epoch, from the next batch on."""

    def __init__(self, batches: Iterable[Sequence[int]] = ()) -> None:
        """Take the batches; they are asked for as late as possible."""
        self._left = iter(batches)
        self._known: list[Sequence[int]] = []
        self._is_spent = False

    def draw(self, count: int) -> None:
        """Ask for more batches, as the run does: this may move random states.

        Args:
            count: The number of batches.
        """
        drawn = list(islice(self._left, count))
        self._known += drawn
        self._is_spent = len(drawn) < count

    def of(self, number: int) -> Sequence[int] | None:
        """Return the indices of a batch; None behind the last one, and if the order is not known.

        Args:
            number: The number of the batch, from 0.
        """
        if number >= len(self._known) and not self._is_spent:
            with undisturbed(None):
                self.draw(number + _DRAWN - len(self._known))
        return self._known[number] if number < len(self._known) else None


@dataclass(frozen=True, slots=True)
class NextBatches:
    """The next batches of a loader, as they are made before the run makes them.

    Attributes:
        batches: The batches; empty if they cannot be made without a change of the run.
        reason: Why not; empty if they are made.
        order: The indices of the rows of each batch.
        rest: The batches of the epoch behind these, made when they are asked for; none if none can be made.
        size: The number of rows of the dataset; None if it is a stream or unknown.
        sample: The first row of the trainer's dataset, before the collator; empty if it is unknown.
    """

    batches: Sequence[ModelBatch] = ()
    reason: str = ""
    order: EpochOrder = field(default_factory=EpochOrder)
    rest: Iterator[ModelBatch] = field(default_factory=lambda: iter(()))
    size: int | None = None
    sample: Mapping[str, Any] = field(default_factory=dict)


def next_batches(loader: Any, dataset: Any, count: int, *, epoch: int = 0, skipped: int = 0) -> NextBatches:
    """Make the next batches that a loader will give, of rows in memory, by its own collator and a copy of its sampler.

    The random states move: call it `undisturbed`. The order of the draws is that of PyTorch's loader.

    Args:
        loader: The loader.
        dataset: The trainer's dataset before unused columns are removed; None if it is unknown.
        count: The number of batches.
        epoch: The epoch of the run, which decides the order of the rows.
        skipped: The batches of the epoch that a resumed run skips.

    Raises:
        RaisedError: If the dataset or the collator raises an exception.
    """
    sample: Mapping[str, Any] = {}
    with suppress(Exception):  # an empty dataset, or a fault of the user's own code, which training meets
        sample = dict(dataset[0]) if _is_in_memory(dataset) else {}
    order = EpochOrder()
    batches: Sequence[ModelBatch] = ()
    rest: Iterator[ModelBatch] = iter(())
    collator = getattr(loader, "collate_fn", None)
    if not (reason := _why_no_order(loader)):
        order = EpochOrder(_orders(loader, epoch, skipped))
        order.draw(count)  # before the first row is read
        reason = _why_not_read(loader.dataset) or _why_not_called(collator)
    if not reason:
        made = _made(loader, dataset, order)
        batches, rest = list(islice(made, count)), made
    return NextBatches(batches, reason, order, rest, _size_of(loader), sample)


def _made(loader: Any, dataset: Any, order: EpochOrder) -> Iterator[ModelBatch]:
    """Yield the batches of an order: the collator is left as it was after each."""
    number = 0
    while (indices := order.of(number)) is not None:
        with _unchanged(getattr(loader, "collate_fn", None)):
            batch = _read(loader, dataset, indices)
        yield batch
        number += 1


def _size_of(loader: Any) -> int | None:
    with suppress(Exception):
        return len(loader.dataset)
    return None


def _why_no_order(loader: Any) -> str:
    """Return why the order of the next rows of a loader is not known; empty if it is."""
    dataset, sampler = getattr(loader, "dataset", None), getattr(loader, "batch_sampler", None)
    if isinstance(dataset, IterableDataset):
        return "the dataset is a stream"
    if dataset is None or sampler is None:
        return "the loader has no dataset with rows by index"
    parts = (part for part in _parts(sampler) if part is not dataset)
    own = next((part for part in parts if not (_is_of_library(part) or _is_in_memory(part))), None)
    if own is not None:
        return f"a look at the order of a {type(own).__name__} may change it"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # with several processes, accelerate's first one reads for all, or gives them its generator
        if type(loader).__name__ == "DataLoaderDispatcher":
            return "the first process reads for all processes"
        if getattr(loader, "synchronized_generator", None) is not None:
            return "the processes draw the order of the rows together"
    return ""


def _why_not_read(dataset: Any) -> str:
    """Return why the rows of a dataset are not read before the run reads them; empty if they are."""
    return "" if _is_in_memory(dataset) else f"a look at a row of a {type(dataset).__name__} may change the next one"


def _why_not_called(collator: Any) -> str:
    """Return why a collator is not called before the run calls it; empty if it is one of a library, without a state."""
    for part in [collator, *_parts(collator)]:
        if not _is_of_library(part):
            name = getattr(part, "__qualname__", type(part).__name__)
            return f"the collator {name} is not one of a library: a call may change the next one"
        if any(isinstance(value, _GENERATORS) for value in getattr(part, "__dict__", {}).values()):
            return f"the collator {type(part).__name__} has random numbers of its own"
    return ""


def _is_in_memory(dataset: Any) -> bool:
    """Return whether a dataset is rows in memory, or mapped into it: a look at one of them changes nothing."""
    if isinstance(dataset, list | tuple):
        return True
    if isinstance(dataset, Subset):
        return _is_in_memory(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(_is_in_memory, dataset.datasets))
    of_hub: Any = getattr(sys.modules.get("datasets"), "Dataset", None)
    if of_hub is not None and isinstance(dataset, of_hub):
        # a transform of the user's is called at each look
        return type(dataset).__getitem__ is of_hub.__getitem__ and dataset.format["type"] != "custom"
    return type(dataset).__module__.startswith("pytest_mistral_lora.")


def _is_of_library(value: Any) -> bool:
    """Return whether a class or a function is of a library, and so holds nothing of a run but its attributes."""
    kind = value if isinstance(value, FunctionType) else type(value)
    return str(kind.__module__).partition(".")[0] in known_libraries()


@cache
def known_libraries() -> frozenset[str]:
    """Return the modules whose functions hold nothing of a run: libraries, and trainers that are used as one."""
    return _LIBRARIES | {trainer.module for trainer in TRAINERS.of_this_package() if trainer.is_library}


@contextmanager
def _unchanged(collator: Any) -> Iterator[None]:
    """Give the parts of a collator their attributes back at the end: one may make its generator at its first call."""
    kept = [(vars(part), dict(vars(part))) for part in _parts(collator)]
    try:
        yield
    finally:
        for attributes, before in kept:
            attributes.clear()
            attributes.update(before)


def _orders(loader: Any, epoch: int, skipped: int) -> Iterator[Any]:
    """Yield the indices of the rows of each batch, with the random states with which the run reads the rows."""
    # a sampler may hold the dataset, which is not copied
    kept = {id(part): part for part in (loader.dataset, *filter(_is_in_memory, _parts(loader.batch_sampler)))}
    sampler, generator = copy.deepcopy((loader.batch_sampler, getattr(loader, "generator", None)), kept)
    for part in _parts(sampler):
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
    # the loader draws it for its workers, whether it has any or not, before it asks for the first row
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    yield from islice(sampler, skipped, None)


def _read(loader: Any, dataset: Any, indices: Sequence[int]) -> ModelBatch:
    """Read the rows of a batch, and collate them.

    Raises:
        RaisedError: If the dataset or the collator raises an exception.
    """
    sources: tuple[SourceRow, ...] = ()
    is_read = False

    def collate(items: Any) -> Any:
        nonlocal is_read, sources
        is_read = True
        sources = _sources(indices, items, loader, dataset)
        return loader.collate_fn(items)

    kinds: Any = _DatasetKind  # without types
    fetcher = kinds.create_fetcher(kinds.Map, loader.dataset, True, collate, False)
    try:
        return ModelBatch(fetcher.fetch(indices), sources)
    except Exception as error:
        place = _place_of(loader.dataset, indices, is_collators=is_read)
        error.add_note(f"raised by {place}, which the guard reads before the first step")
        raise RaisedError(error) from error


def _sources(indices: Sequence[int | None], items: Any, loader: Any, dataset: Any) -> tuple[SourceRow, ...]:
    """Return the rows that a collator gets, before it takes columns out of them; empty if they are not known.

    Args:
        indices: Their indices, or None for each.
        items: The rows.
        loader: The loader.
        dataset: The trainer's dataset before unused columns are removed; None if it is unknown.
    """
    # a second look costs time, and only a look into memory changes nothing
    texts = dataset if dataset is not loader.dataset and _is_in_memory(dataset) else None
    with suppress(Exception):
        if all(index is None or isinstance(index, Integral) for index in indices) and len(items) == len(indices):
            return tuple(SourceRow.of(index, item, texts) for index, item in zip(indices, items, strict=True))
    return ()


class BatchSources:
    """Tells the rows of the dataset that the batches of a run are made of, as the run itself reads them.

    Without workers, it stands in the place of the loader's collator and keeps the rows of the last batches: no row is
    read twice. With workers, rows in memory are read again.
    """

    def __init__(self, loader: Any, dataset: Any, order: EpochOrder, kept: int) -> None:
        """Stand in the place of the loader's collator.

        Args:
            loader: The loader.
            dataset: As for `next_batches`.
            order: What is known of the order of its rows.
            kept: The number of batches that the run makes at most before the model gets the first of them.
        """
        self._loader, self._dataset, self._order = loader, dataset, order
        self._made: deque[tuple[Sequence[int | None], list[Any], ModelBatch]] = deque(maxlen=kept)
        self._number = 0
        self._reader: Any = getattr(loader, "base_dataloader", loader)  # that of accelerate's loaders
        self._own: Any = getattr(self._reader, "collate_fn", None)
        self._is_in_place = self._own is not None and not getattr(loader, "num_workers", 0)
        if self._is_in_place:
            self._reader.collate_fn = self

    def __call__(self, items: Any) -> Any:
        """Collate rows as the loader's own collator does, and keep them for `of`."""
        if not isinstance(items, Sequence):
            return self._own(items)
        indices = self._order.of(self._number)
        self._number += 1
        # a collator may take columns out of them
        rows = [dict(item) if type(item) is dict else item for item in items]
        batch = self._own(items)
        if isinstance(batch, Mapping):
            self._made.append((indices or [None] * len(rows), rows, ModelBatch(dict(batch))))
        return batch

    def of(self, number: int, data: Mapping[str, Any]) -> tuple[SourceRow, ...]:
        """Return the rows behind a batch that the model gets; empty if they are not known.

        Args:
            number: The number of the batch, from 0.
            data: The batch.
        """
        if self._is_in_place:
            while self._made:  # a resumed run skips some of a stream
                indices, rows, batch = self._made.popleft()
                if batch.is_fed(data):
                    return _sources(indices, rows, self._loader, self._dataset)
            return ()
        known = self._order.of(number)
        if known is None or not _is_in_memory(self._loader.dataset):
            return ()
        return _sources(known, [self._loader.dataset[index] for index in known], self._loader, self._dataset)

    def leave(self) -> None:
        """Keep no more rows, and give the loader its collator back."""
        self._made.clear()
        if self._is_in_place and self._reader.collate_fn is self:
            self._reader.collate_fn = self._own


def _parts(root: Any) -> list[Any]:
    """Return a sampler, a dataset or a collator and those behind it that have attributes, each once."""
    found: dict[int, Any] = {}
    waiting = [root]
    while waiting:
        part = waiting.pop()
        if id(part) in found or not isinstance(getattr(part, "__dict__", None), dict) or isinstance(part, type):
            continue
        found[id(part)] = part
        waiting += [vars(part)[name] for name in _PARTS if name in vars(part)]
    return list(found.values())


def _place_of(dataset: Any, indices: Any, *, is_collators: bool) -> str:
    """Return the row that cannot be read; if each can by itself, the rows of the batch."""
    shown = ", ".join(f"train_dataset[{index}]" for index in indices[:_SHOWN])
    shown += and_more(_SHOWN, len(indices))
    if is_collators:
        return f"the collator, given {shown}"
    for index in indices:
        try:
            dataset[index]
        except Exception:
            return f"train_dataset[{index}]"
    return f"the dataset, asked for {shown}"


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


@contextmanager
def without_new_loaders(trainer: Any) -> Iterator[None]:
    """Let a trainer and its accelerator forget, at the end, the loaders that are made here: they are not of the run."""
    loaders = getattr(getattr(trainer, "accelerator", None), "_dataloaders", [])
    known = list(loaders)
    kept = vars(trainer).get("_eval_dataloaders")  # of workers that persist
    before = None if kept is None else dict(kept)
    try:
        yield
    finally:
        loaders[:] = known
        vars(trainer).pop("_eval_dataloaders", None)
        if before is not None:
            trainer._eval_dataloaders = before
