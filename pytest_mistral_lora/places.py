"""The place of a value: a file, a row, a field, a token. A place is a value itself, and its text is made last.

>>> place = Place.of("rows.jsonl", record=3) / "messages" / 1 / "content"
>>> str(place)
'rows.jsonl:3, messages[1].content'
>>> str(Place(NamedSource("rows", is_value=True), record=3))
'rows[2]'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pytest_mistral_lora.escaping import printable

__all__ = ["NOWHERE", "NamedSource", "Place"]

_DIGITS = re.compile(r"[0-9]+")
_LONGEST = 200
"""Most characters of a name to print: a row may have a key of any length."""


@dataclass(frozen=True, slots=True)
class NamedSource:
    """The thing that a place lies in, by the name that its user knows.

    Attributes:
        name: A file or a folder, an expression of Python such as `train_dataset`, an option, an address, a check.
        is_value: Whether its records are items of a Python value, counted from 0, and not records of a file, counted
            from 1.
    """

    name: str
    is_value: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value lies.

    Attributes:
        source: The thing that it lies in.
        record: The number of its record, from 1; None for the source as a whole.
        line: The line where the record, or a setting of a file, begins, from 1; None if it is not known, and in a file
            whose records are its lines.
        split: The split of a `DatasetDict`, or the number of a batch from 0; None without one.
        part: The path within the record: a side, a conversation, a message, a field; names, and indices from 0.
        token: The index of a token, from 0; None for no token.
    """

    source: NamedSource = NamedSource("")
    record: int | None = None
    line: int | None = None
    split: str | int | None = None
    part: tuple[str | int, ...] = ()
    token: int | None = None

    @classmethod
    def of(cls, name: object, record: int | None = None, line: int | None = None) -> Place:
        """Return a place in a source that is not a Python value.

        Args:
            name: A path, or any other name. A `Place` is returned as it is.
            record: The number of the record, from 1; None for the whole source.
            line: The line, from 1.
        """
        if isinstance(name, Place):
            return name
        text = str(name)
        return cls(NamedSource(text), record, line) if text else NOWHERE

    def __truediv__(self, step: str | int) -> Place:
        """Return the place of a part: a field by its name, or an item by its index."""
        return Place(self.source, self.record, self.line, self.split, (*self.part, step), self.token)

    def within(self, *steps: str | int) -> Place:
        """Return the place of a part that several steps lead to."""
        return Place(self.source, self.record, self.line, self.split, (*self.part, *steps), self.token)

    def at_token(self, token: int) -> Place:
        """Return the place of a token, by its index from 0."""
        return replace(self, token=token)

    @property
    def whole(self) -> Place:
        """The place of the source as a whole."""
        return Place(self.source)

    @property
    def row(self) -> Place:
        """The place of the record as a whole."""
        return Place(self.source, self.record, self.line, self.split)

    @property
    def field(self) -> str:
        """The path within the record as text, such as `messages[1].content`; empty for the whole record."""
        text = ""
        for step in self.part:
            name = f"[{step}]" if isinstance(step, int) else step if len(step) <= _LONGEST else f"{step[:_LONGEST]}…"
            text += f".{name}" if text and isinstance(step, str) else name
        return text

    @property
    def kind(self) -> str:
        """A text that is equal for the same part of other records, other indices and other layers."""
        name = f"{self.source.name}:#" if self.record is not None else self.source.name
        return f"{name} {_DIGITS.sub('#', self.field)}"

    @property
    def order(self) -> tuple[Any, ...]:
        """A key that sorts places as a reader meets them: by source, then by number."""
        split = (isinstance(self.split, int), self.split) if self.split is not None else ()
        # names before indices; both never stand at the same place of one source
        part = tuple((1, step, "") if isinstance(step, int) else (0, 0, step) for step in self.part)
        token = -1 if self.token is None else self.token
        return self.source.name, split, self.record or 0, self.line or 0, part, token

    def __bool__(self) -> bool:
        """Return whether it says anything."""
        return bool(self.source.name or self.part or self.token is not None)

    def __str__(self) -> str:
        """Return the place as printable text, such as `file:3, messages[1].content` or `rows['train'][2]`."""
        text = self.source.name
        if self.split is not None:
            text += f"[{self.split!r}]"
        if self.record is None:
            text += f":{self.line}" if self.line is not None else ""
        elif self.source.is_value:
            text += f"[{self.record - 1}]"
        elif self.line is None:
            text += f":{self.record}"
        else:
            text += f" record {self.record}, line {self.line}"
        token = f"token {self.token}" if self.token is not None else ""
        # any name may lie in it, and a place is one line
        return printable(", ".join(filter(None, (text, self.field, token))), lines=False)

    def to_json(self) -> dict[str, Any]:
        """Return the place as plain JSON data, which `from_json` reads."""
        return {
            "source": self.source.name,
            "is_value": self.source.is_value,
            "record": self.record,
            "line": self.line,
            "split": self.split,
            "part": list(self.part),
            "token": self.token,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Place:
        """Return the place of the result of `to_json`."""
        source = NamedSource(data["source"], data["is_value"])
        return cls(source, data["record"], data["line"], data["split"], tuple(data["part"]), data["token"])


NOWHERE = Place()
"""The place of a value that was made in code: its text is empty."""


def file_of(place: Place) -> str:
    """Return the file of a row; empty for a row that is not in a file."""
    is_of_file = place.record is not None and not place.source.is_value
    return place.source.name if is_of_file else ""
