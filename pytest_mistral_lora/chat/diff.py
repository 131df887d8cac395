"""Two encodings of one row: their tokens in pairs, the marks and the shape of a difference, and their parts.

Whatever compares tokens asks here. `TokenDiff` aligns ids. `align_controls` and `diff_parts` align the parts of a row:
a control token, and the text up to the next one. Their users only say what a difference means.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cached_property
from itertools import groupby, product, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.pieces import is_control, piece_units, plain_text, visible

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

WINDOW = 300
"""Tokens or parts to align at once behind a difference; the time grows with their square."""

_MOST_PAIRS = 1_000_000
_MOST_PARTS = 6
"""Parts of one side of a shape."""

_AROUND = 5
"""Tokens of a table on each side of a difference."""
_MOST_ROWS = 16
"""Rows of a table from the first difference on."""
_LONGEST_PIECE = 16
_V1_MARKER = re.compile(r"(\[/?INST\])")

Block = tuple[str, int, int, int, int]
"""Tokens that are equal or not, as `SequenceMatcher` has them: its word, start and end in one side and the other."""

Pair = tuple[int | None, int | None]
"""A token of the expected and of the found ids, by index; None if one side has no such token."""


class ShownToken(NamedTuple):
    """A token of one encoding.

    Attributes:
        position: Its place in `input_ids`.
        id: Its id.
        piece: Its spelling in the vocabulary. It may hold any character: print it by `chat.pieces.visible`.
        label: `train`, `-100`, `train 5` for the id of another token, `?` if it is missing; empty if not compared.
        control: Whether it is a control token.
    """

    position: int
    id: int
    piece: str
    label: str
    control: bool

    @property
    def trained(self) -> bool:
        """Whether the token has a loss."""
        return self.label.startswith("train")


class TokenSide(NamedTuple):
    """One encoding of a row.

    Attributes:
        name: Its origin for people, such as `mistral-common` or `chat-template`.
        ids: `input_ids`, one `int` a token.
        labels: As long as `ids`, `IGNORE_INDEX` for no loss; None if they are not known or not compared.
        piece: Gives the vocabulary's spelling of an id, such as the `shown` of an encoder.
        spans: The owners of its tokens; empty if they are not known.
    """

    name: str
    ids: Sequence[int]
    labels: Sequence[int] | None
    piece: Callable[[int], str]
    spans: Sequence[Span] = ()

    @classmethod
    def of(cls, name: str, encoded: EncodedRow, piece: Callable[[int], str]) -> TokenSide:
        """Return the side of an encoded row."""
        return cls(name, encoded.input_ids, encoded.labels, piece, encoded.spans)

    def token(self, index: int) -> ShownToken:
        """Return one token."""
        piece = self.piece(self.ids[index])
        return ShownToken(index, self.ids[index], piece, self.label(index), is_control(piece))

    def label(self, index: int) -> str:
        """Return a label for people: `train`, `-100`, `train 5` for the id of another token; `?` if it is missing.

        Without labels it is empty.
        """
        if self.labels is None:
            return ""
        if index >= len(self.labels):
            return "?"
        if self.labels[index] == IGNORE_INDEX:
            return "-100"
        return "train" if self.labels[index] == self.ids[index] else f"train {self.labels[index]}"

    def owners(self) -> list[tuple[int | None, str | None]]:
        """Return the turn and the role of each token; None for both if no turn owns it."""
        owners: list[tuple[int | None, str | None]] = [(None, None)] * len(self.ids)
        for span in self.spans:
            owners[span.start : span.end] = [(span.turn, span.role)] * (span.end - span.start)
        return owners


def with_shape(found: str, shape: str) -> str:
    """Return a fault in words, with the shape of its difference: `other ids than recorded: after [INST]: ␣ → nothing`.

    Args:
        found: The fault.
        shape: The result of `TokenDiff.shape`, or another key of the cause, which is left out.
    """
    return f"{found}: {shape}" if " → " in shape else found


@dataclass(frozen=True)
class TokenDiff:
    """Two encodings of one row, aligned.

    Attributes:
        expected: The encoding that is right, mistral-common's. Its spans own the tokens of both.
        found: The encoding to compare with it. Labels are compared if both sides have them.
        same_vocabulary: Whether equal ids mean equal tokens. If not, tokens are equal if their texts are.
    """

    expected: TokenSide
    found: TokenSide
    same_vocabulary: bool = True

    @classmethod
    def of(
        cls,
        expected: tuple[Sequence[int], Sequence[int] | None],
        found: tuple[Sequence[int], Sequence[int] | None],
        piece: Callable[[int], str],
        names: tuple[str, str] = ("mistral-common", "found"),
        spans: Sequence[Span] = (),
    ) -> TokenDiff:
        """Return the difference of two encodings of one vocabulary.

        Args:
            expected: The `input_ids` and `labels` that are right; labels are not compared if they are None.
            found: The `input_ids` and `labels` to compare with them.
            piece: Gives the vocabulary's spelling of an id.
            names: The origin of both sides, for people.
            spans: The owners of the expected tokens; empty if they are not known.
        """
        return cls(TokenSide(names[0], *expected, piece, spans), TokenSide(names[1], *found, piece))

    @cached_property
    def _keys(self) -> tuple[Sequence[Hashable], Sequence[Hashable]]:
        """For each side, what makes two tokens equal."""
        if self.same_vocabulary:
            return self.expected.ids, self.found.ids
        want, have = ([plain_text(side.piece(token)) for token in side.ids] for side in (self.expected, self.found))
        return want, have

    @cached_property
    def equal_ids(self) -> int:
        """The number of tokens that both sides have in common at their start."""
        return equal_beginning(*self._keys)

    @cached_property
    def _blocks(self) -> list[Block]:
        """The blocks behind the first different token, up to the window's end."""
        return _window_blocks(*self._keys, (self.equal_ids, self.equal_ids))

    @cached_property
    def pairs(self) -> list[Pair]:
        """The tokens of both sides in order, up to the end of the window."""
        return [*((index, index) for index in range(self.equal_ids)), *_pairs_of(self._blocks)]

    def all_pairs(self) -> Iterator[Pair]:
        """Yield the tokens of both sides in order, to their ends."""
        return _pairs_of(_all_blocks(*self._keys))

    def mark(self, pair: Pair) -> str:
        """Return `-` for a token that is missing, `+` for one too many, `>` for another id or label, else nothing."""
        want, have = pair
        if have is None:
            return "-"
        if want is None:
            return "+"
        labels = self.expected.label(want), self.found.label(have)
        is_other = self._keys[0][want] != self._keys[1][have] or (all(labels) and labels[0] != labels[1])
        return ">" if is_other else ""

    @cached_property
    def marked(self) -> list[int]:
        """Indices of the marked `pairs`; empty if both sides are equal."""
        return [number for number, pair in enumerate(self.pairs) if self.mark(pair)]

    def table(self) -> str:
        """Return the tokens around the first difference, side by side; empty if both sides are equal."""
        if not self.marked:
            return ""
        first = last = self.marked[0]
        for number in self.marked:
            last = number if number <= min(last + _AROUND, first + _MOST_ROWS) else last
        rows: list[tuple[str, ...]] = [("", "token", "expected", "label", "token", "found", "label")]
        for want, have in self.pairs[max(0, first - _AROUND) : last + _AROUND + 1]:
            rows.append((self.mark((want, have)), *_cells(self.expected, want), *_cells(self.found, have)))
        widths = [max(len(row[column]) for row in rows) for column in range(7)]
        lengths = f"{len(self.expected.ids)} tokens expected, {len(self.found.ids)} found"
        lines = [f"{lengths}; the first difference is at token {first}"]
        for mark, *cells in rows:
            shown = zip(cells, ("rjust", "ljust", "ljust") * 2, widths[1:], strict=True)
            padded = "  ".join(getattr(cell, side)(width) for cell, side, width in shown)
            lines.append(f"{mark or ' '} {padded}".rstrip())
        later = sum(number > last + _AROUND for number in self.marked)
        if later:
            # the rows may differ again behind the window
            is_cut = max(len(self.expected.ids), len(self.found.ids)) > self.equal_ids + WINDOW
            lines.append(f"… {'' if is_cut else f'{later} '}more token{'s differ' if later > 1 else ' differs'}")
        return "\n".join(lines)

    def shape(self) -> str:
        """Return the shape of the first difference, the same for each row that one fault changes; empty without one."""
        if not self.marked:
            return ""
        want, have = self.pairs[self.marked[0]]
        expected, found = self.expected, self.found
        if have is None and self.equal_ids == len(found.ids) and len(expected.ids) > self.equal_ids + 1:
            return "the row is cut"
        if want is None or have is None or self._keys[0][want] != self._keys[1][have]:
            _, start, end, found_start, found_end = next(block for block in self._blocks if block[0] != "equal")
            return units_shape(
                self._control_before(start),
                piece_units(map(expected.piece, expected.ids[start:end])),
                piece_units(map(found.piece, found.ids[found_start:found_end])),
            )
        piece = expected.piece(expected.ids[want])
        if not is_control(piece):
            near = bool(want) and is_control(expected.piece(expected.ids[want - 1]))
            piece = f"{'first ' if near else ''}text after {self._control_before(want) or 'the start'}"
        labels = (label.split()[0] for label in (expected.label(want), found.label(have)))
        return f"label of {piece}: {' → '.join(labels)}"

    def _control_before(self, index: int) -> str:
        """Return the last control token before a token of the expected side; empty if no control token precedes it."""
        before = reversed(self.expected.ids[max(0, index - WINDOW) : index])
        return next((piece for piece in map(self.expected.piece, before) if is_control(piece)), "")


def _cells(side: TokenSide, index: int | None) -> tuple[str, str, str]:
    """Return the cells of a token in a table: its place, its id with its text, and its label."""
    if index is None:
        return "", "", ""
    piece = side.piece(side.ids[index])
    if not is_control(piece):
        shown = visible(piece)
        piece = f"'{shown if len(shown) <= _LONGEST_PIECE else shown[: _LONGEST_PIECE - 1] + '…'}'"
    return str(index), f"{side.ids[index]} {piece}", side.label(index)


def equal_beginning(want: Sequence[object], have: Sequence[object], start: tuple[int, int] = (0, 0)) -> int:
    """Return the number of items that two sequences have in common from `start` on."""
    least = min(len(want) - start[0], len(have) - start[1])
    return next((n for n in range(least) if want[start[0] + n] != have[start[1] + n]), least)


def common_ends(want: Sequence[Hashable], have: Sequence[Hashable]) -> tuple[int, int]:
    """Return the number of items that two sequences have in common at their start, and behind those at their end."""
    head = equal_beginning(want, have)
    return head, equal_beginning(want[head:][::-1], have[head:][::-1])


def _window_blocks(want: Sequence[Hashable], have: Sequence[Hashable], start: tuple[int, int]) -> list[Block]:
    """Return the blocks of one window from `start` on, without a last difference that the window cuts."""
    i, j = start
    codes = SequenceMatcher(None, want[i : i + WINDOW], have[j : j + WINDOW], autojunk=False).get_opcodes()
    is_cut = max(len(want) - i, len(have) - j) > WINDOW
    # the two windows end at different places, so a difference in their last block is not one of the rows
    if is_cut and len(codes) > 2 and codes[-1][0] != "equal":
        codes.pop()
    return [(name, i + a, i + b, j + c, j + d) for name, a, b, c, d in codes]


def _all_blocks(want: Sequence[Hashable], have: Sequence[Hashable]) -> Iterator[Block]:
    """Yield blocks that cover two sequences of any length, in order; the time grows with their length."""
    i = j = 0
    while i < len(want) or j < len(have):
        if same := equal_beginning(want, have, (i, j)):
            yield "equal", i, i + same, j, j + same
            i, j = i + same, j + same
        else:
            found = _window_blocks(want, have, (i, j))
            yield from found
            i, j = found[-1][2], found[-1][4]


def _pairs_of(blocks: Iterable[Block]) -> Iterator[Pair]:
    for _, want, want_end, have, have_end in blocks:
        yield from zip_longest(range(want, want_end), range(have, have_end))


def align_controls(want: Sequence[Hashable], have: Sequence[Hashable]) -> list[Block]:
    """Return the blocks of two lists of control tokens with the fewest tokens left out or put in.

    `SequenceMatcher` takes the longest equal run first, which pairs the wrong turns of a conversation if a token is
    missing in each of them. Time and memory grow with the product of the lengths: from a million on, it is used.
    """
    if len(want) * len(have) > _MOST_PAIRS:
        return list(SequenceMatcher(None, want, have, autojunk=False).get_opcodes())
    # the least number of changes that make the rest of one sequence from each position that of the other
    least = [[len(want) - i + len(have) - j for j in range(len(have) + 1)] for i in range(len(want) + 1)]
    for i, j in product(reversed(range(len(want))), reversed(range(len(have)))):
        changes = 1 + min(least[i + 1][j], least[i][j + 1])
        least[i][j] = min(changes, least[i + 1][j + 1]) if want[i] == have[j] else changes
    blocks: list[Block] = []
    i = j = 0
    while i < len(want) or j < len(have):
        start = i, j
        while i < len(want) and j < len(have) and want[i] == have[j] and least[i][j] == least[i + 1][j + 1]:
            i, j = i + 1, j + 1
        if (i, j) != start:
            blocks.append(("equal", start[0], i, start[1], j))
            continue
        while i < len(want) or j < len(have):
            if i < len(want) and j < len(have) and want[i] == have[j] and least[i][j] == least[i + 1][j + 1]:
                break
            if i < len(want) and least[i][j] == 1 + least[i + 1][j]:
                i += 1
            else:
                j += 1
        if i == start[0]:
            code = "insert"
        elif j == start[1]:
            code = "delete"
        else:
            code = "replace"
        blocks.append((code, start[0], i, start[1], j))
    return blocks


def units_shape(before: str, expected: Sequence[str], found: Sequence[str]) -> str:
    """Return the shape of the difference between two lists of control tokens and characters; empty if they are equal.

    Args:
        before: The control token before them; empty at the start.
        expected: mistral-common's side; a text is a list of its characters.
        found: The side to compare with it.
    """
    start, end = common_ends(expected, found)
    sides = [side[start : len(side) - end] for side in (expected, found)]
    if not any(sides):
        return ""
    changed = " → ".join(_describe(side) for side in sides)
    if any(is_control(unit) for side in sides for unit in side):
        return changed
    before = next((unit for unit in reversed(expected[:start]) if is_control(unit)), before)
    return f"after {before or 'the start'}: {changed}"


def _describe(units: Sequence[str]) -> str:
    """Return control tokens by name, white space unchanged, and any other text as the word `text`."""
    parts: list[str] = []
    text = ""
    for unit in [*units, ""]:
        if unit and not is_control(unit):
            text += unit
            continue
        # white space inside a text is part of it, and white space beside it is mostly the fault itself
        if text.strip():
            parts += [visible(text[:1]).strip() if text[0].isspace() else "", "text", "␣" if text[-1] == " " else ""]
        else:
            parts.append("".join(dict.fromkeys(visible(text))))
        parts.append(unit)
        text = ""
    # one padding token or a hundred: the same fault
    shown = [part for part, _ in groupby(filter(None, parts))]
    return " ".join(shown[:_MOST_PARTS]) or "nothing"


@dataclass(frozen=True, slots=True)
class MarkedText:
    """A control token and the text up to the next one.

    Attributes:
        marker: The control token as it is written; empty for a text at the start.
        text: The text, decoded.
        ids: The text's ids; empty for v1, whose `[INST]` is itself text.
    """

    marker: str
    text: str
    ids: tuple[int, ...] = ()

    @property
    def spelled(self) -> str:
        """The marker and the text."""
        return self.marker + self.text


def decode_text(ids: Sequence[int], oracle: Oracle) -> str:
    """Return the text of ids, with the leading space that SentencePiece drops at the start of a text."""
    # "a" keeps the decoder from taking the first space of the ids for the one that it puts before every text
    before = oracle.encode_text("a")
    return oracle.decode([*before, *ids]).removeprefix("a") if ids else ""


def join_parts(runs: Iterable[tuple[str | None, str, tuple[int, ...]]]) -> list[MarkedText]:
    """Return the parts of a row; the first has no control token.

    Args:
        runs: In order, a control token or None, a text and its ids. The text of a control token is left out.
    """
    parts = [MarkedText("", "")]
    for marker, text, ids in runs:
        if marker is None:
            last = parts.pop()
            parts.append(MarkedText(last.marker, last.text + text, last.ids + ids))
        else:
            parts.append(MarkedText(marker, ""))
    return parts


def split_at_markers(ids: Sequence[int], oracle: Oracle) -> list[MarkedText]:
    """Return ids as parts; ids outside the vocabulary are not allowed, and an empty part at the start is left out."""
    parts = join_parts(_runs(ids, oracle))
    return parts if parts[0] != MarkedText("", "") else parts[1:]


def _runs(ids: Sequence[int], oracle: Oracle) -> Iterator[tuple[str | None, str, tuple[int, ...]]]:
    """Yield control tokens and decoded texts, as `join_parts` takes them."""
    markers = oracle.markers
    for is_marker, group in groupby(ids, markers.__contains__):
        run = tuple(group)
        if is_marker:
            yield from ((markers[token], "", ()) for token in run)
        elif oracle.facts.control_tokens:
            yield None, decode_text(run, oracle), run
        else:
            # [INST] and [/INST] are spelled in the text
            first, *rest = _V1_MARKER.split(decode_text(run, oracle))
            yield None, first, ()
            for marker, text in zip(rest[::2], rest[1::2], strict=True):
                yield marker, "", ()
                yield None, text, ()


@dataclass(frozen=True, slots=True)
class Hunk:
    """A run of parts that differ.

    Attributes:
        expected: The expected parts.
        found: The parts found in their place.
        pairs: Pairs of parts with equal markers.
        missing: Expected parts without a counterpart, in runs.
        surplus: Found parts without a counterpart, in runs.
    """

    expected: tuple[MarkedText, ...]
    found: tuple[MarkedText, ...]
    pairs: list[tuple[MarkedText, MarkedText]] = field(default_factory=list)
    missing: list[tuple[MarkedText, ...]] = field(default_factory=list)
    surplus: list[tuple[MarkedText, ...]] = field(default_factory=list)


def diff_parts(expected: Sequence[MarkedText], found: Sequence[MarkedText]) -> list[Hunk]:
    """Return the differences of two lists of parts; the parts of each difference are matched by their markers.

    Of long lists only the first `WINDOW` parts from the first difference on are compared.
    """
    # most faults leave the structure alone and need no alignment
    if [part.marker for part in expected] == [part.marker for part in found]:
        differing = [pair for pair in zip(expected, found, strict=True) if pair[0] != pair[1]]
        return [Hunk((want,), (have,), [(want, have)]) for want, have in differing[:WINDOW]]
    start = next((n for n, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), 0)
    want, have = expected[start : start + WINDOW], found[start : start + WINDOW]
    codes = [code for code in SequenceMatcher(None, want, have, autojunk=False).get_opcodes() if code[0] != "equal"]
    if len(codes) > 1 and max(len(expected), len(found)) - start > WINDOW and codes[-1][2] == len(want):
        codes.pop()  # caused by the end of the window, not by the row
    hunks = []
    for _, *bounds in codes:
        a, b, c, d = bounds
        hunk = Hunk(tuple(want[a:b]), tuple(have[c:d]))
        markers = [part.marker for part in hunk.expected], [part.marker for part in hunk.found]
        for tag, a, b, c, d in SequenceMatcher(None, *markers, autojunk=False).get_opcodes():
            if tag == "equal":
                pairs = zip(hunk.expected[a:b], hunk.found[c:d], strict=True)
                hunk.pairs.extend(pair for pair in pairs if pair[0] != pair[1])
                continue
            hunk.missing.extend([hunk.expected[a:b]] if a < b else [])
            hunk.surplus.extend([hunk.found[c:d]] if c < d else [])
        hunks.append(hunk)
    return hunks
