"""Faults that trainers make with a row: each changes sound ids and labels, and names the classes that may be found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from random import Random
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.oracle.encoder_trace import TracedText
from pytest_mistral_lora.chat.rows import Row, text_of
from pytest_mistral_lora.errors import OracleRejection

Data = Mapping[str, Any]
Encoding = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Case:
    """A row, its sound encoding, and chance."""

    data: dict[str, Any]
    oracle: Oracle
    chance: Random

    @cached_property
    def row(self) -> Row:
        return parse_row(self.data)

    @cached_property
    def encoded(self) -> EncodedRow:
        return self.oracle.encode(self.row)

    @property
    def ids(self) -> list[int]:
        return list(self.encoded.input_ids)

    @property
    def labels(self) -> list[int]:
        return list(self.encoded.labels or ())

    @cached_property
    def pieces(self) -> list[TracedText]:
        return self.oracle.traced_texts(self.row)

    def texts(self, role: str) -> list[str]:
        return [text_of(m.get("content")) for m in self.data["messages"] if m["role"] == role]

    def of(self, data: Data) -> Encoding | None:
        """The encoding of another row; None where it is the same, or there is none."""
        try:
            encoded = self.oracle.encode(parse_row(data))
        except OracleRejection:
            return None
        if encoded.input_ids == self.encoded.input_ids:
            return None
        return list(encoded.input_ids), list(encoded.labels or ())

    def with_messages(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Encoding | None:
        return self.of({**self.data, "messages": [change(dict(m)) for m in self.data["messages"]]})

    def from_ids(self, ids: list[int]) -> Encoding | None:
        """Other ids, with labels that a trainer may have given them."""
        return (ids, [IGNORE_INDEX] * len(ids)) if ids != self.ids else None

    def from_labels(self, labels: list[int]) -> Encoding | None:
        return (self.ids, labels) if labels != self.labels else None


@dataclass(frozen=True)
class Fault:
    """A fault of a trainer.

    Attributes:
        make: Returns the broken ids and labels of a row; None where the fault cannot happen to it.
        family: The rules of which one must fire.
    """

    make: Callable[[Case], Encoding | None]
    family: frozenset[str]

    def __call__(self, case: Case) -> Encoding | None:
        return self.make(case)


def fault(family: str) -> Callable[[Callable[[Case], Encoding | None]], Fault]:
    return lambda make: Fault(make, frozenset(f"ML{number}" for number in family.split()))


@cache
def oracle_of(name: str) -> Oracle:
    return Oracle(shipped_tokenizer(name))
