"""Two encodings of one row side by side: which tokens were put in, left out or labelled otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

from pytest_mistral_lora.chat.difference import (
    WINDOW,
    Block,
    equal_beginning,
    is_control,
    label_word,
    piece_units,
    units_shape,
    visible,
    window_blocks,
)
from pytest_mistral_lora.chat.encoded import Span
from pytest_mistral_lora.chat.token_rows import Column, TokenRow, TokenSide, difference_mark

AROUND = 5
"""Tokens shown on each side of a difference."""
_MOST_ROWS = 16
"""Rows of the table from the first difference on."""
_LONGEST_PIECE = 16
_TOKENS_BEFORE = 12
_TOKENS_SHOWN = 64
"""Tokens of a row on a page, and those among them before the first difference."""

Ids = Sequence[int]
Labels = Sequence[int] | None
Pair = tuple[int | None, int | None]
"""A token of the expected and of the found ids, by index; None if one side has no such token."""


@dataclass(frozen=True)
class Alignment:
    """Two encodings of one row.

    Attributes:
        expected: mistral-common's `input_ids` and `labels`; labels of None are not compared.
        found: The `input_ids` and `labels` to compare with them.
        piece: Gives the vocabulary's spelling of an id.
        names: The origin of both sides, for people.
        spans: The owners of the expected tokens; empty if they are not known.
    """

    expected: tuple[Ids, Labels]
    found: tuple[Ids, Labels]
    piece: Callable[[int], str]
    names: tuple[str, str] = ("mistral-common", "found")
    spans: Sequence[Span] = ()

    @cached_property
    def _first_id(self) -> int:
        """The number of ids with which both sides begin."""
        return equal_beginning(self.expected[0], self.found[0])

    @cached_property
    def _codes(self) -> list[Block]:
        """The blocks behind the first different id, up to the window's end."""
        return window_blocks(self.expected[0], self.found[0], (self._first_id, self._first_id))

    def pairs(self) -> Iterator[Pair]:
        """Yield the tokens of both sides in order, up to the end of the window."""
        yield from ((index, index) for index in range(self._first_id))
        for _, want, want_end, have, have_end in self._codes:
            yield from zip_longest(range(want, want_end), range(have, have_end))

    def mark(self, pair: Pair) -> str:
        """Return `-` for a token that is missing, `+` for one too many, `>` for another id or label, else nothing."""
        want, have = pair
        expected = None if want is None else label_word(*self.expected, want)
        found = None if have is None else label_word(*self.found, have)
        is_other = want is not None and have is not None and self.expected[0][want] != self.found[0][have]
        return difference_mark(expected, found, is_other)

    @cached_property
    def _marked(self) -> tuple[list[Pair], list[int]]:
        """The tokens of both sides, and the numbers of those that are marked."""
        pairs = list(self.pairs())
        return pairs, [number for number, pair in enumerate(pairs) if self.mark(pair)]

    def tokens(self, title: str) -> TokenRow | None:
        """Return the tokens around the first difference for a page; None if there is none.

        Args:
            title: The place of the row.
        """
        pairs, changed = self._marked
        if not changed:
            return None
        # a part of the row: findings travel between processes, and a long row has thousands of tokens
        start = max(0, changed[0] - _TOKENS_BEFORE)
        sides = [TokenSide(n, *s, self.piece) for n, s in zip(self.names, (self.expected, self.found), strict=True)]
        columns: list[Column] = []
        owner: tuple[int | None, str | None] = (None, None)
        for pair in pairs[start : start + _TOKENS_SHOWN]:
            shown = tuple(None if i is None else side.token(i) for side, i in zip(sides, pair, strict=True))
            if (index := pair[0]) is not None:
                spans = (one for one in self.spans if one.start <= index < one.end)
                owner = next(((one.turn, one.role) for one in spans), (None, None))
            columns.append(Column(shown, self.mark(pair), *owner))
        count = len(self.expected[0])
        part = f": tokens {start} to {start + len(columns) - 1} of {count}" if len(columns) < count else ""
        return TokenRow(f"{title}{part}", self.names, tuple(columns))

    def parts(self, title: str) -> dict[str, Any]:
        """Return table, shape and tokens of the first difference, as a finding takes them."""
        return {"detail": self.table(), "shape": self.shape(), "tokens": self.tokens(title)}

    def table(self) -> str:
        """Return the tokens around the first difference, side by side; empty if there is none."""
        pairs, changed = self._marked
        if not changed:
            return ""
        first = last = changed[0]
        for number in changed:
            last = number if number <= min(last + AROUND, first + _MOST_ROWS) else last
        rows: list[tuple[str, ...]] = [("", "token", "expected", "label", "token", "found", "label")]
        for pair in pairs[max(0, first - AROUND) : last + AROUND + 1]:
            sides = zip((self.expected, self.found), pair, strict=True)
            cells = [cell for side, index in sides for cell in self._cells(side, index)]
            rows.append((self.mark(pair), *cells))
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        lengths = f"{len(self.expected[0])} tokens expected, {len(self.found[0])} found"
        lines = [f"{lengths}; the first difference is at token {first}"]
        for mark, *cells in rows:
            shown = zip(cells, ("rjust", "ljust", "ljust") * 2, widths[1:], strict=True)
            padded = "  ".join(getattr(cell, side)(width) for cell, side, width in shown)
            lines.append(f"{mark or ' '} {padded}".rstrip())
        later = sum(number > last + AROUND for number in changed)
        if later:
            # if the rows go on behind the window, there may be more of them
            is_cut = max(len(self.expected[0]), len(self.found[0])) > self._first_id + WINDOW
            lines.append(f"… {'' if is_cut else f'{later} '}more token{'s differ' if later > 1 else ' differs'}")
        return "\n".join(lines)

    def _cells(self, side: tuple[Ids, Labels], index: int | None) -> tuple[str, str, str]:
        if index is None:
            return "", "", ""
        piece = self.piece(side[0][index])
        if not is_control(piece):
            shown = visible(piece)
            piece = f"'{shown if len(shown) <= _LONGEST_PIECE else shown[: _LONGEST_PIECE - 1] + '…'}'"
        return str(index), f"{side[0][index]} {piece}", label_word(*side, index)

    def shape(self) -> str:
        """Return the shape of the first difference, the same for each row that one fault changes; or nothing."""
        first = next((pair for pair in self.pairs() if self.mark(pair)), None)
        if first is None:
            return ""
        want, have = first
        if have is None and self._first_id == len(self.found[0]) and len(self.expected[0]) > self._first_id + 1:
            return "the row is cut"
        if want is None or have is None or self.expected[0][want] != self.found[0][have]:
            changed = next(code for code in self._codes if code[0] != "equal")
            sides = [
                piece_units(map(self.piece, ids[start:end]))
                for ids, start, end in (
                    (self.expected[0], changed[1], changed[2]),
                    (self.found[0], changed[3], changed[4]),
                )
            ]
            return units_shape(self._control_before(changed[1]), *sides)
        piece = self.piece(self.expected[0][want])
        if not is_control(piece):
            near = bool(want) and is_control(self.piece(self.expected[0][want - 1]))
            piece = f"{'first ' if near else ''}text after {self._control_before(want) or 'the start'}"
        labels = (label_word(*side, want).split()[0] for side in (self.expected, self.found))
        return f"label of {piece}: {' → '.join(labels)}"

    def _control_before(self, index: int) -> str:
        pieces = (self.piece(token) for token in reversed(self.expected[0][max(0, index - WINDOW) : index]))
        return next((piece for piece in pieces if is_control(piece)), "")
