"""The table of the rows of a pass: columns of a few bytes a row, which the rules on several rows share."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Order = npt.NDArray[np.int64]
    """The index of each row before it was put in order: (rows,) int64."""

# 128 bits: among a billion rows, two different ones share a digest with a chance of about 1 in 10**21
DIGEST_BYTES = 16
SKETCH_BYTES = 64
# a file of 2**40 rows would have tens of terabytes, and 24 bits are left for the number of the file
LINE_BITS = 40


@dataclass
class JudgedTable:
    """The rows of a pass, each with its place, its side of the split, and what tells it from other rows.

    A row with one prompt takes 66 bytes: 8 for its place, 4 for its line, 1 for its side of the split and 1 for the
    length of its answer, 16 for each of three digests, and 4 for the owner of its prompt. A further prompt takes 20,
    and a sketch 64. A preference record takes 20 for its opposite in place of those for prompts.

    Attributes:
        places: File and record of each row, packed into one number.
        lines: The line where each row begins, if its records are not lines; else 0.
        held_out: 1 for each row that is held out, 0 for each that is trained on.
        short: 1 for each row whose last answer is a few words, of which a prompt can have but one.
        rows: A digest of each row's ids and labels.
        likenesses: A digest of each row's texts without spaces, case, punctuation and Unicode form.
        sketches: A sketch of each row for finding near rows, of `SKETCH_BYTES`; empty without sketches.
        prompts: A digest of the ids before each assistant turn that is trained on.
        owners: The row of each prompt; the last prompt of a row identifies it.
        sided: The row of each record with sides.
        opposites: A digest of the record that says the opposite of each of these.
    """

    places: array[int] = field(default_factory=lambda: array("Q"))
    lines: array[int] = field(default_factory=lambda: array("I"))
    held_out: bytearray = field(default_factory=bytearray)
    short: bytearray = field(default_factory=bytearray)
    rows: bytearray = field(default_factory=bytearray)
    likenesses: bytearray = field(default_factory=bytearray)
    sketches: bytearray = field(default_factory=bytearray)
    prompts: bytearray = field(default_factory=bytearray)
    owners: array[int] = field(default_factory=lambda: array("I"))
    sided: array[int] = field(default_factory=lambda: array("I"))
    opposites: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.places)

    def extend(self, other: JudgedTable) -> None:
        """Add the rows of another part of the files."""
        # before the columns grow: the other part counts its rows from 0
        first = len(self)
        self.owners.extend(first + owner for owner in other.owners)
        self.sided.extend(first + row for row in other.sided)
        self.places.extend(other.places)
        self.lines.extend(other.lines)
        for name in ("held_out", "short", "rows", "likenesses", "sketches", "prompts", "opposites"):
            getattr(self, name).extend(getattr(other, name))

    def order(self) -> Order | None:
        """Return the order of the files, regardless of the order of adding parts; None if the rows are in order."""
        if all(place <= other for place, other in pairwise(self.places)):
            return None
        import numpy as np

        return np.argsort(np.frombuffer(self.places, np.uint64))

    def reorder(self, order: Order) -> None:
        """Put the rows in another order, with their prompts and sides."""
        import numpy as np

        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        owners = rank[np.frombuffer(self.owners, np.uint32)].astype(np.uint32)
        # stable: the prompts of a row stay in its order
        prompts = np.argsort(owners, kind="stable")
        sided = rank[np.frombuffer(self.sided, np.uint32)].astype(np.uint32) if self.sided else np.zeros(0, np.uint32)
        records = np.argsort(sided)

        def taken(column: bytearray, size: int, indices: Any) -> bytearray:
            return bytearray(np.frombuffer(column, np.uint8).reshape(-1, size)[indices].data)

        self.places = reordered(self.places, order)
        self.lines = reordered(self.lines, order)
        self.held_out = taken(self.held_out, 1, order)
        self.short = taken(self.short, 1, order)
        self.rows = taken(self.rows, DIGEST_BYTES, order)
        self.likenesses = taken(self.likenesses, DIGEST_BYTES, order)
        self.sketches = taken(self.sketches, SKETCH_BYTES, order) if self.sketches else self.sketches
        self.owners = array("I", owners[prompts].tobytes())
        self.prompts = taken(self.prompts, DIGEST_BYTES, prompts)
        self.sided = array("I", sided[records].tobytes())
        self.opposites = taken(self.opposites, DIGEST_BYTES, records) if self.opposites else self.opposites


def reordered(column: array[int], order: Order) -> array[int]:
    """Return a column of one number a row in another order."""
    import numpy as np

    return array(column.typecode, np.frombuffer(column, np.dtype(column.typecode))[order].tobytes())


def packed_place(file: int, record: int) -> int:
    """Return file and record as one number, which orders rows as the files have them."""
    return file << LINE_BITS | record


def unpacked_place(place: int) -> tuple[int, int]:
    """Return the file and record of a number that `packed_place` made."""
    return place >> LINE_BITS, place & ((1 << LINE_BITS) - 1)


def digest_at(digests: bytearray, index: int) -> bytes:
    """Return one of many digests."""
    return bytes(digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])


def equal_groups(digests: bytearray, indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of each digest that several rows share, in order of the first."""
    with memoryview(digests).cast("Q") as halves:
        # millions of digests are sorted as numbers, which takes little memory; only those that may be repeated are
        # put into groups
        repeated = {half for half, other in pairwise(sorted(halves[2 * index] for index in indices)) if half == other}
        groups: dict[bytes, list[int]] = {}
        for index in indices:
            if halves[2 * index] in repeated:
                groups.setdefault(digest_at(digests, index), []).append(index)
    yield from (group for group in groups.values() if len(group) > 1)
