"""Rows and their encodings with the faults of a trainer, for the tests of reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer

Sides = tuple[list[int], list[int]]
Change = Callable[[list[int], list[int]], Sides]


def as_it_is(ids: list[int], labels: list[int]) -> Sides:
    return ids, labels


def without_a_token(ids: list[int], labels: list[int]) -> Sides:
    return ids[:3] + ids[4:], labels[:3] + labels[4:]


def without_bos(ids: list[int], labels: list[int]) -> Sides:
    return ids[1:], labels[1:]


def all_trained_on(ids: list[int], labels: list[int]) -> Sides:
    return ids, ids


def question_rows(texts: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each text of a user."""
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Paris."}]} for text in texts
    ]


def encoded_lines(rows: Sequence[dict[str, Any]], changes: Sequence[Change]) -> Iterator[dict[str, Any]]:
    """Yield the line of each row in a file of encoded rows, with one change for each row."""
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    for number, (row, change) in enumerate(zip(rows, changes, strict=True)):
        encoded = oracle.encode(row)
        ids, labels = change(list(encoded.input_ids), list(encoded.labels or ()))
        yield {"row": number, **row, "input_ids": ids, "labels": labels}
