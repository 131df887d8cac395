"""The rows of the dataset that the rows of a batch were made of, by their ids: collators sort, cut and join rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from pytest_mistral_lora.chat.kinds.records import record_kind
from pytest_mistral_lora.conformance.encoded.lines import has_row
from pytest_mistral_lora.conformance.encoded.sides import has_sides, split_sides
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.declared_keys import DECLARED_KEYS, declared_values
from pytest_mistral_lora.guarding.preferences import COLUMNS, sides_of
from pytest_mistral_lora.places import NOWHERE

Record = dict[str, Any]
"""An encoded row as plain data: `input_ids`, `labels`, and if the batch has them `attention_mask`, `position_ids`; or a
preference record, as in `preferences`."""

_Sides = tuple[tuple[int, ...], ...]
"""The ids of a row: of a preference record, of each of its answers with the prompt."""

_LEAST_ALIKE = 0.5
"""Least share of equal tokens with which a row of a batch is named after a row of the dataset, if its ids differ."""


@dataclass(frozen=True, slots=True)
class SourceRow:
    """A row of the dataset, as the loader has read it.

    Attributes:
        index: Its number in the dataset; None in a stream.
        sides: Its ids; empty if it has none, because the collator makes them.
        texts: The messages, texts or gap beside them, if there are any, and what says that the answer was cut.
    """

    index: int | None
    sides: _Sides
    texts: Mapping[str, Any]

    @classmethod
    def of(cls, index: int | None, item: Any, dataset: Any) -> SourceRow:
        """Return a row of the loader's dataset, with the messages that the trainer's dataset has beside the same ids.

        Args:
            index: Its number, or None.
            item: The row as the loader's dataset gives it.
            dataset: The trainer's dataset before unused columns are removed; None if it is unknown.
        """
        sides = _sides_of_item(item)
        found = item
        # whatever it raises, the run itself does not read this row of it
        with suppress(Exception):
            whole = None if dataset is None or index is None else dataset[index]
            if isinstance(whole, Mapping) and _sides_of_item(whole) == sides:
                found = whole
        return cls(None if index is None else int(index), sides, _texts_of(found) if sides else {})


def _sides_of_item(item: Any) -> _Sides:
    if not isinstance(item, Mapping):
        return ()
    if item.get("input_ids") is not None:
        ids = item["input_ids"]
        plain = ids.tolist() if hasattr(ids, "tolist") else ids
        is_flat = isinstance(plain, Sequence) and all(isinstance(token, int) for token in plain)
        return (tuple(plain),) if is_flat else ()
    if has_sides(item):
        with suppress(RowError):
            return tuple(tuple(side.record["input_ids"]) for side in split_sides(item, NOWHERE))
    return ()


def _texts_of(item: Mapping[str, Any]) -> dict[str, Any]:
    if item.get("input_ids") is None:
        keys: Sequence[str] = COLUMNS
    elif item.get("messages") is not None:
        keys = ("messages", "tools")
    else:
        kind = record_kind(item)
        keys = () if kind.is_chat else kind.keys
    texts = {key: item[key] for key in keys if item.get(key) is not None}
    if "messages" in texts:
        # a batch does not show what a whole column says; a column may have tensors
        plain = [(key, value) for key, value in declared_values(item) if isinstance(value, str | int | float)]
        texts |= {key: value for key, value in plain if DECLARED_KEYS[key].is_cut(value)}
    try:
        json.dumps(texts)
    except (TypeError, ValueError):  # such as images
        return {}
    # they may have the format of another program
    return {} if "messages" in texts and not has_row(texts) else texts


@dataclass(frozen=True, slots=True)
class PairedRecord:
    """A row of a batch, with the rows of the dataset that it is made of.

    Attributes:
        record: Its ids and labels, with the messages of these rows.
        index: The row of the dataset; None if it is not known, or there are several.
        count: Number of rows of the dataset in it.
    """

    record: Record
    index: int | None
    count: int = 1


def paired(records: Sequence[Record], sources: Sequence[SourceRow]) -> list[PairedRecord]:
    """Return the rows of a batch, each with its row of the dataset if its ids tell it.

    Args:
        records: The rows of the batch.
        sources: The rows of the dataset in it, in the order in which the collator got them; empty if they are unknown.
    """
    if len(records) == 1 and len(sources) > 1:
        return [PairedRecord(_joined(records[0], sources), None, len(sources))]
    if len(records) != len(sources):
        return [PairedRecord(record, None) for record in records]
    if not any(source.sides for source in sources):
        # the collator makes the ids: nothing tells that it changes the order
        return [PairedRecord(record, source.index) for record, source in zip(records, sources, strict=True)]
    places = _matched(records, sources)
    is_in_order = all(place in (None, n) for n, place in enumerate(places))
    found = []
    for number, (record, place) in enumerate(zip(records, places, strict=True)):
        if place is not None:
            found.append(PairedRecord({**record, **sources[place].texts}, sources[place].index))
            continue
        alike = _most_alike(record, sources)
        index = sources[alike].index if alike is not None else sources[number].index if is_in_order else None
        found.append(PairedRecord(record, index))
    return found


def _matched(records: Sequence[Record], sources: Sequence[SourceRow]) -> list[int | None]:
    """Return the position of the source whose ids each record has, or None if none has them, or several have.

    Whole rows come first: the beginning of a row that was cut may be that of several rows.
    """
    places: list[int | None] = [None] * len(records)
    free = set(range(len(sources)))
    given = [[_without_padding(ids, mask) for ids, mask in _padded_sides(record)] for record in records]
    for is_cut in (False, True):
        for number, sides in enumerate(given):
            if places[number] is not None:
                continue
            # most collators keep the order: a batch of many rows is not compared row with row
            if number in free and _is_made_of(sides, sources[number], is_cut=is_cut):
                places[number] = number
            else:
                fitting = [n for n in sorted(free) if _is_made_of(sides, sources[n], is_cut=is_cut)]
                places[number] = fitting[0] if len(fitting) == 1 else None
            if (place := places[number]) is not None:
                free.discard(place)
    return places


def _is_made_of(sides: Sequence[Sequence[tuple[int, ...]]], source: SourceRow, *, is_cut: bool) -> bool:
    """Return whether each side of a record has the ids of a source, up to padding and perhaps a cut.

    Args:
        sides: The ids of each side, with and without the padding that its attention mask hides.
        source: The row of the dataset.
        is_cut: Whether a part of the source may be missing.
    """
    return len(sides) == len(source.sides) > 0 and all(
        _fits(variants, own, is_cut=is_cut) for variants, own in zip(sides, source.sides, strict=True)
    )


def _padded_sides(record: Record) -> list[tuple[list[int], Sequence[int] | None]]:
    """Return the ids of each side of a record with its attention mask."""
    if "input_ids" in record:
        return [(record["input_ids"], record.get("attention_mask"))]
    names = [key.removesuffix("_input_ids") for key in record if key.endswith("_input_ids")]
    masks = [record.get(f"{name}_attention_mask") for name in names]
    return [(ids, mask) for (ids, _), mask in zip(sides_of(record), masks, strict=False)]


def _without_padding(ids: Sequence[int], mask: Sequence[int] | None) -> list[tuple[int, ...]]:
    """Return the ids of a side as they are, and without what the attention mask hides at the ends."""
    shown = [n for n, value in enumerate(mask) if value] if mask is not None else []
    whole = tuple(ids)
    return [whole, whole[shown[0] : shown[-1] + 1]] if shown else [whole]


def _fits(variants: Sequence[tuple[int, ...]], own: tuple[int, ...], *, is_cut: bool) -> bool:
    for variant in variants:
        # padding behind the row, or a cut at its end; then padding before it, or a cut at its start
        if _begins_as(variant, own, is_cut=is_cut) or _begins_as(variant[::-1], own[::-1], is_cut=is_cut):
            return True
    return False


def _begins_as(ids: tuple[int, ...], own: tuple[int, ...], *, is_cut: bool) -> bool:
    """Return whether ids begin as a row and are padded behind it."""
    if ids[: len(own)] == own:
        same = len(own)
    elif is_cut:
        same = _equal_beginning(ids, own)
    else:
        return False
    return (same > 0 or not own) and len(set(ids[same:])) <= 1


def _equal_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def _most_alike(record: Record, sources: Sequence[SourceRow]) -> int | None:
    """Return the position of the source that has most tokens of a record, if they are many and it is the only one."""
    have = Counter(token for ids, _ in _padded_sides(record) for token in ids)
    shares = []
    for source in sources:
        wanted = Counter(token for ids in source.sides for token in ids)
        shares.append(2 * (have & wanted).total() / max(have.total() + wanted.total(), 1))
    best = max(shares)
    return shares.index(best) if best >= _LEAST_ALIKE and shares.count(best) == 1 else None


def _joined(record: Record, sources: Sequence[SourceRow]) -> Record:
    """Return a row that holds several rows of the dataset, with their records if it has the ids of each."""
    left = [source for source in sources if len(source.sides) == 1 and source.texts]
    ids, start, conversations = tuple(record.get("input_ids") or ()), 0, []
    if len(left) != len(sources):
        return record
    while left:
        fitting = [row for row in left if ids[start : start + len(row.sides[0])] == row.sides[0]]
        if not fitting:
            return record
        # one row may begin as another
        row = max(fitting, key=lambda fit: len(fit.sides[0]))
        left.remove(row)
        conversations.append(dict(row.texts))
        start += len(row.sides[0])
    # the rest is padding
    return record if len(set(ids[start:])) > 1 else {**record, "conversations": conversations}
