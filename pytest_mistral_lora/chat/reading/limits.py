"""The bounds on the size of data files, for every container: lines, arrays, CSV, tables, compressed or not.

A row is measured by its text: the bytes of its line, and in a table the bytes of its texts and names, where each value
counts as eight bytes, null or not. JSON of a row takes up to thirty times its bytes as objects of Python.
"""

from __future__ import annotations

from pathlib import Path

from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.places import Place

MAX_ROW_BYTES = 20 << 20
"""A larger row is refused: five million tokens, more than any model of Mistral's reads."""
VALUE_BYTES = 8
"""The least that a value of a table counts, so that nulls count, too."""
MAX_NAME_BYTES = 1 << 20
"""The most bytes of the names of a table's columns, which each of its rows repeats."""
PIECE_ROWS = 256
"""The most rows of a table that are read at once; together they have at most `MAX_ROW_BYTES` bytes."""
READ_MEMORY = 768 << 20
"""The most memory that the reader of a table may take."""
READ_CPU_SECONDS = 60.0
"""The most CPU time for the rows that are read at once."""
_ALWAYS = 1 << 30
_RATIO = 1000


def row_too_large(size: int, place: Place) -> RowError:
    """Return the error of a row that is larger than `MAX_ROW_BYTES`.

    Args:
        size: Its bytes, or as many of them as were read.
        place: The row.
    """
    return RowError(f"the row has {size:,} bytes", place=place, expected=at_most(MAX_ROW_BYTES))


def at_most(size: int) -> str:
    """Return a bound in words."""
    return f"at most {size:,} bytes ({size >> 20:,} MiB)"


class Expansion:
    """The bytes that come out of a compressed file, compared with its size: a few bytes can expand to terabytes.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size
        # gzip expands a byte to at most 1,032 bytes
        self._most = _ALWAYS + _RATIO * self._size
        self._read = 0

    def count(self, read: int) -> None:
        """Count bytes that came out.

        Raises:
            InputError: If they are too many for the file.
        """
        self._read += read
        if self._read > self._most:
            raise InputError(
                f"{self._size:,} bytes hold {self._read:,} bytes of rows and more",
                place=str(self._path),
                expected=f"{at_most(_ALWAYS)} and {_RATIO:,} times the file",
            )
