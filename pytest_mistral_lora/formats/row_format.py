"""A row format: how to recognise its records, and how to convert a record to the messages of a row."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.remedies import import_step
from pytest_mistral_lora.formats.drafts import Draft, RecordReading
from pytest_mistral_lora.formats.report import Change


class Evidence(NamedTuple):
    """The keys of a record that show its format.

    Attributes:
        words: The keys in words, for people.
        keys: Keys of the record, by the name of the field that they hold.
    """

    words: str
    keys: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class RowFormat:
    """A format of records to convert to rows.

    Attributes:
        name: Its name in options, recipes and manifests.
        title: Its name in sentences.
        keys: The keys of a record with this declared format, by the name of the field that they hold.
        recognise: Returns the evidence in a record, or None if it has another format. The second argument is the keys
            that count as present: those with a value, or all of them.
        convert: Moves the messages of a record from its fields to the draft of its row, and returns the changes.
        is_tried_first: Whether its records may also have the keys of other formats.
        unread: Returns what a record is that looks like one of this format and is none, and what to do; None for any
            other record. The arguments are those of `recognise`.
    """

    name: str
    title: str
    keys: Mapping[str, str]
    recognise: Callable[[Mapping[str, Any], Collection[str]], Evidence | None]
    convert: Callable[[Draft, RecordReading], tuple[Draft, list[Change]]]
    is_tried_first: bool = False
    unread: Callable[[Mapping[str, Any], Collection[str]], tuple[str, str] | None] = lambda record, present: None


@dataclass(frozen=True, slots=True)
class Recognised:
    """The format of a record.

    Attributes:
        name: The name of a row format; empty for a format without turns.
        title: The format and its evidence, `ShareGPT (conversations with from/value)`.
        evidence: The keys that show it, in words.
        keys: Keys of the record, by the name of the field that they hold.
        advice: The next step for a format without turns; else empty.
    """

    name: str
    title: str
    evidence: str
    keys: Mapping[str, str]
    advice: str = ""

    @property
    def is_row(self) -> bool:
        """Whether the record is a row already, with nothing to convert."""
        return self.name == "messages" and self.keys["messages"] == "messages"

    def next_step(self, path: str) -> str:
        """Return the sentence with the command for a file of this format; `path` is empty if the file is not known."""
        return self.advice.replace("FILE", shlex.quote(path) if path else "FILE") or import_step(path)
