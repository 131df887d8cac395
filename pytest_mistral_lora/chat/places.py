"""The place of a record in its file: `rows.jsonl:3`, or `qa.csv record 3, line 4` where a record is not a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_AT = r"(?::(?P<line>[0-9]{1,15})| record (?P<record>[0-9]{1,15}), line (?P<first_line>[0-9]{1,15}))"
# behind it, a place may name a field
_PLACE = re.compile(rf"(?P<file>.+?){_AT}(?=, |$)(?P<field>.*)", flags=re.DOTALL)


class RecordPlace(NamedTuple):
    """The parts of a place.

    Attributes:
        file: The file, as the place names it.
        record: The number of the record, from 1; of a file of lines, the line.
        line: The line where the record begins, from 1.
        field: The rest of the place, such as `, messages[1].role`; may be empty.
        is_record: Whether it names a record and its line, and not a line alone.
    """

    file: str
    record: int
    line: int
    field: str
    is_record: bool

    @classmethod
    def parse(cls, place: str) -> RecordPlace | None:
        """Return the parts of a place; None for a place that names no record."""
        found = _PLACE.fullmatch(place)
        if found is None:
            return None
        line = int(found["line"] or found["first_line"])
        return cls(found["file"], int(found["record"] or line), line, found["field"], found["record"] is not None)


def record_place(file: Path | str, record: int, line: int) -> str:
    """Return the place of a record that is not a line of its own.

    Args:
        file: The file.
        record: The number of the record, from 1.
        line: The line where it begins, from 1.
    """
    return f"{file} record {record}, line {line}"


def file_of(place: str) -> str:
    """Return the file that a place names; empty for a place that names no record."""
    found = RecordPlace.parse(place)
    return "" if found is None else found.file


def by_number(place: str) -> list[tuple[int, str]]:
    """Return a key that sorts places with their numbers as numbers: `rows.jsonl:9` before `rows.jsonl:10`."""
    parts = re.split(r"([0-9]+)", place)
    # by its length and then its digits, a number may have any number of them
    numbers = (part.lstrip("0") for part in parts[1::2])
    keys = [(0, part) for part in parts]
    keys[1::2] = [(1 + len(number), number) for number in numbers]
    return keys


_BARE = re.compile(r"""'[^']*'|"[^"]*"|[-+]?[\d.,]+|None|True|False|null|true|false|\[[^\]]*\]|\{[^}]*\}""")


def named_value(found: str, place: str, title: str) -> str:
    """Return what was found as one line in which a bare value, such as `'usr'`, has the name of its field.

    Args:
        found: The value found, or words.
        place: Its place.
        title: The title of the rule, for a value whose place has no field.
    """
    line = " ".join(found.split())
    if not _BARE.fullmatch(line):
        return line
    _, _, field = place.rpartition(", ")
    is_field = field != place and re.search(r"[a-z_]", field) is not None
    return f"{field}: {line}" if is_field else f"{line}: {title}"
