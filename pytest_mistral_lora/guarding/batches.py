"""The first batches of a training loader, read so that the run draws what it would have drawn without the reading."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset
from torch.utils.data.dataloader import _DatasetKind  # the loader's own reader: axolotl replaces it for packed rows

from pytest_mistral_lora.chat.fields import FIM_KEYS
from pytest_mistral_lora.guarding.preferences import COLUMNS, is_preference, preference_records

Record = dict[str, Any]
"""An encoded row as plain data: `input_ids`, `labels`, and if the batch has them `attention_mask`, `position_ids`; or a
preference record, as in `preferences`."""

_COLUMNS = ("input_ids", "labels", "attention_mask", "position_ids")
_PARTS = ("batch_sampler", "sampler", "data_source", "dataset", "collate_fn", "data_collator", "collator")
"""Attributes of loaders, samplers, datasets and collators that lead to other objects with a state."""


@dataclass(frozen=True, slots=True)
class ModelBatch:
    """A batch as the model gets it.

    Attributes:
        data: The collated batch.
        indices: The rows of the dataset in it, in order; empty if the dataset is a stream.
    """

    data: Mapping[str, Any]
    indices: tuple[int, ...] = ()

    def records(self) -> list[Record]:
        """Return the rows of the batch; a flattened batch is one row.

        Returns:
            `input_ids` and `labels` of a row have the same length, with padding.
        """
        if is_preference(self.data, len(self.indices)):
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
        `(batch, length)` int64.
    """
    attends = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    begins = attends.int().argmax(-1)  # the first token that each token attends to
    is_new = torch.ones_like(begins, dtype=torch.bool)
    is_new[:, 1:] = begins[:, 1:] != begins[:, :-1]
    is_row = attends.any(-1)
    return (is_new & is_row).cumsum(-1) * is_row


def can_be_read_twice(loader: Any) -> bool:
    """Return whether a loader's dataset has rows by index: a stream would lose the rows that are read ahead."""
    dataset = getattr(loader, "dataset", None)
    has_rows = dataset is not None and not isinstance(dataset, IterableDataset)
    return has_rows and getattr(loader, "batch_sampler", None) is not None


def first_batches(loader: Any, count: int, *, epoch: int = 0, skipped: int = 0) -> list[ModelBatch]:
    """Return the next batches that a loader will give, and leave its samplers as they were.

    The rows are read and collated in this process, whatever the number of worker processes. Call it within
    `undisturbed`.

    Args:
        loader: A `DataLoader` over a dataset with rows by index.
        count: The number of batches.
        epoch: The epoch of the run, which decides the order of the rows.
        skipped: The batches of the epoch that a resumed run skips.
    """
    for part in _parts(loader):
        if hasattr(part, "set_epoch") and part is not loader.dataset:
            part.set_epoch(epoch)
    kinds: Any = _DatasetKind  # without types
    fetcher = kinds.create_fetcher(kinds.Map, loader.dataset, True, loader.collate_fn, False)
    places = iter(loader.batch_sampler)
    return [
        ModelBatch(fetcher.fetch(indices), tuple(indices) if all(isinstance(n, int) for n in indices) else ())
        for indices in islice(places, skipped, skipped + count)
    ]


@contextmanager
def undisturbed(loader: Any, device: torch.device) -> Iterator[None]:
    """Restore every random state at the end: of Python, numpy, torch and the device, and of the loader's own parts.

    Args:
        loader: The training loader; None for the random states alone.
        device: The device of the run.
    """
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    module = None if device.type in ("cpu", "meta") else torch.get_device_module(device)
    of_device = None if module is None else module.get_rng_state()
    parts = [(part, dict(vars(part)), _generator_states(part)) for part in _parts(loader)]
    try:
        yield
    finally:
        for part, attributes, generators in parts:
            vars(part).clear()
            vars(part).update(attributes)
            for name, state in generators.items():
                _set_state(attributes[name], state)
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if module is not None:
            module.set_rng_state(of_device)


def _parts(loader: Any) -> list[Any]:
    """Return the samplers, datasets and collators behind a loader that have attributes, each once."""
    found: dict[int, Any] = {}
    waiting = [getattr(loader, name, None) for name in _PARTS]
    while waiting:
        part = waiting.pop()
        # a function has no state, and a class is not an object of the run
        if id(part) in found or not isinstance(getattr(part, "__dict__", None), dict) or isinstance(part, type):
            continue
        found[id(part)] = part
        waiting += [vars(part)[name] for name in _PARTS if name in vars(part)]
    return list(found.values())


def _generator_states(part: Any) -> dict[str, Any]:
    """Return the state of each random generator among the attributes of an object, by name."""
    states: dict[str, Any] = {}
    for name, value in vars(part).items():
        if isinstance(value, torch.Generator | np.random.RandomState):
            states[name] = value.get_state()
        elif isinstance(value, np.random.Generator):
            states[name] = value.bit_generator.state
        elif isinstance(value, random.Random):
            states[name] = value.getstate()
    return states


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def with_messages(records: Sequence[Record], batch: ModelBatch, dataset: Any) -> list[Record]:
    """Return the rows with the messages or the gap that the trainer's dataset has beside its ids, if it has any.

    Args:
        records: The rows of the batch.
        batch: The batch.
        dataset: The trainer's dataset before unused columns are removed; None if it is unknown.
    """
    names = getattr(dataset, "column_names", None) or ()
    if is_preference(batch.data, len(batch.indices)):
        keys = [key for key in COLUMNS if key in names]
    elif "input_ids" not in names:
        keys = []
    elif "messages" in names:
        keys = [key for key in ("messages", "tools") if key in names]
    else:
        # of a packed sequence of gaps, the ids are read back
        is_fim = set(FIM_KEYS) <= set(names) and len(records) == len(batch.indices)
        keys = [*FIM_KEYS] if is_fim else []
    if not keys or len(records) not in (1, len(batch.indices)):
        return list(records)
    sources = (dataset[index] for index in batch.indices)
    conversations = [{key: source[key] for key in keys if source[key] is not None} for source in sources]
    if len(records) == len(conversations):
        return [record | conversation for record, conversation in zip(records, conversations, strict=True)]
    return [{**records[0], "conversations": conversations}]
