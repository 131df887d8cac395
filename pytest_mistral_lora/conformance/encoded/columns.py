"""The columns beside the ids of an encoded row: their names, and values in them that no trainer can use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pytest_mistral_lora.conformance.encoded.fault import EncodingFault
from pytest_mistral_lora.conformance.encoded.integers import Ids
from pytest_mistral_lora.errors import and_more

WEIGHTS = "loss_weights"
"""The key of the weights by which the loss of each token is multiplied."""
MASKS = ("assistant_masks", "assistant_tokens_mask", "completion_mask", "loss_mask", WEIGHTS)
"""Keys of the masks that decide what is trained on: a token has a loss if each mask is 1. A weight is a
mask of 1 if it is not 0."""

LENGTHS = ("seq_lengths", "cu_seqlens")
"""Keys that tell the conversations of a packed sequence: their lengths, and the sums of these from 0 on."""

NUMBERS = ("sequence_ids", "seq_idx")
"""Keys that number the conversations of a packed sequence at each of its tokens, from 0 or 1 on; -1 at padding."""
_MOST_SEQUENCES = 2**31 - 1
"""The largest number of a conversation: collators and kernels of packed rows hold it as int32."""

_LARGEST = 3.4028234663852886e38
"""The largest float32; a larger weight is infinite when the loss is multiplied by it."""


def numbers_of(data: Mapping[str, Any], count: int) -> dict[str, Ids]:
    """Return the numbers of the conversations that a record has for each of its ids, by key.

    Numbers that ML570 reports are left out.

    Args:
        data: The record.
        count: The number of its ids.
    """
    given = _number_columns(data, count)
    return {key: values for key, values in given.items() if all(map(_is_number_of_sequence, values))}


def _is_number_of_sequence(value: int) -> bool:
    return -1 <= value <= _MOST_SEQUENCES


def _number_columns(data: Mapping[str, Any], count: int) -> dict[str, Ids]:
    # a list of another length is no number for each token: the ids that a dataset gives its conversations, for example
    given = {key: data.get(key) for key in NUMBERS}
    return {
        key: tuple(values)
        for key, values in given.items()
        if isinstance(values, list) and len(values) == count and all(type(value) is int for value in values)
    }


def value_faults(data: Mapping[str, Any], count: int) -> Iterator[EncodingFault]:
    """Yield a fault for each column of a record with values that contradict what the column is.

    Args:
        data: A record whose columns can be read.
        count: The number of its ids.
    """
    for key in MASKS:
        if key != WEIGHTS:
            yield from mask_faults(data, key)
    yield from _faults_of("attention_mask", data, lambda value: value >= 0, "0 at padding, and 1 at each token")
    for key, numbers in _number_columns(data, count).items():
        expected = f"a number from 0 to {_MOST_SEQUENCES:,} for each conversation, or -1 at padding"
        yield from _faults_of(key, {key: numbers}, _is_number_of_sequence, expected)
    # a loss of infinity times 0 is no number, so a token without a label counts as well
    weights = data.get(WEIGHTS) or ()
    yield from _faults_of(WEIGHTS, data, lambda value: abs(value) <= _LARGEST, "finite numbers from 0 on")
    negative = [n for n, weight in enumerate(weights) if -_LARGEST <= weight < 0]
    if negative:
        yield EncodingFault("ML571", _shown(WEIGHTS, weights, negative), "0 at a token that is not to be learned")


def mask_faults(data: Mapping[str, Any], key: str) -> Iterator[EncodingFault]:
    """Yield a fault if a mask has other values than 0 and 1.

    Args:
        data: A record whose mask is a list of integers, if it has it.
        key: The key of the mask.
    """
    yield from _faults_of(key, data, lambda value: value in (0, 1), "0 or 1 at each token")


def _faults_of(
    key: str, data: Mapping[str, Any], is_possible: Callable[[Any], bool], expected: str
) -> Iterator[EncodingFault]:
    values = data.get(key) or ()
    bad = [n for n, value in enumerate(values) if not is_possible(value)]
    if bad:
        yield EncodingFault("ML570", _shown(key, values, bad), expected)


def _shown(key: str, values: Any, bad: list[int]) -> str:
    """Return the first of some values of a column, its place, and how many more there are."""
    return f"{key} is {values[bad[0]]!r:.24} at token {bad[0]}{and_more(1, len(bad))}"
