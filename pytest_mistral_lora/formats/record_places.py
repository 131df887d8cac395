"""Find the lines of records: a pass over converted rows keeps their numbers, and a fault needs the line of its record.

Only the files of the faults are read again, up to the last of their records: a pass without faults costs nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from pytest_mistral_lora.chat.places import RecordPlace, record_place
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.containers import open_source


def record_places(files: Sequence[DataFile], texts: Iterable[str]) -> Callable[[str], str]:
    """Return a function that writes the place of a record with its line, in any text.

    It makes `qa.csv record 3, line 4` of `qa.csv:3`, and leaves the places of files of lines and of tables as they are.

    Args:
        files: The files of the rows.
        texts: The texts that name places; records that none of them names get no line.
    """
    names = {str(file.path): file for file in files if file.source is not None}
    if not names:
        return lambda text: text
    pattern = re.compile(rf"({'|'.join(map(re.escape, names))}):(\d+)(?!\d)")
    wanted: dict[str, set[int]] = {}
    for text in texts:
        for name, number in pattern.findall(text):
            wanted.setdefault(name, set()).add(int(number))
    lines = {name: _lines_of(names[name], numbers) for name, numbers in wanted.items()}

    def place(found: re.Match[str]) -> str:
        line = lines.get(found[1], {}).get(int(found[2]))
        return found[0] if line is None else record_place(found[1], int(found[2]), line)

    return partial(pattern.sub, place)


def _lines_of(file: DataFile, numbers: set[int]) -> dict[int, int]:
    """Return the line of each of some records; empty for a file whose records are lines or have none."""
    found: dict[int, int] = {}
    try:
        for record in open_source(file.path).records(lambda read: None):
            parts = RecordPlace.parse(record.place)
            if parts is None or not parts.is_record:
                break
            if parts.record in numbers:
                found[parts.record] = parts.line
            if len(found) == len(numbers):
                break
    except InputError:
        pass  # the pass over the rows has reported it
    return found
