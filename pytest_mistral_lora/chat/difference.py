"""The shape of a difference between two token sequences: the same for every row that one fault changes."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import groupby, product

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX

_CONTROL = re.compile(r"\[/?[A-Z_]{3,}\]|</?s>|<unk>|<pad>|<\|\w+\|>|<SPECIAL_\d+>")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_VISIBLE = {" ": "␣", "▁": "␣", "\n": "⏎", "<0x0A>": "⏎", "\t": "⇥"}
_MOST_PARTS = 6

WINDOW = 300
"""Tokens that are aligned at once behind a difference; the time grows with their square."""

_MOST_PAIRS = 1_000_000

Block = tuple[str, int, int, int, int]
"""Tokens that are equal or not, as `SequenceMatcher` has them: its word, start and end in one side and the other."""


def equal_beginning(want: Sequence[Hashable], have: Sequence[Hashable], start: tuple[int, int] = (0, 0)) -> int:
    """Return the number of items that two sequences have in common from `start` on."""
    least = min(len(want) - start[0], len(have) - start[1])
    return next((n for n in range(least) if want[start[0] + n] != have[start[1] + n]), least)


def window_blocks(want: Sequence[Hashable], have: Sequence[Hashable], start: tuple[int, int]) -> list[Block]:
    """Return the blocks of one window from `start` on, without a last difference that the window cuts."""
    i, j = start
    codes = SequenceMatcher(None, want[i : i + WINDOW], have[j : j + WINDOW], autojunk=False).get_opcodes()
    is_cut = max(len(want) - i, len(have) - j) > WINDOW
    # the last block of two windows that are cut at other places is no difference of the rows
    if is_cut and len(codes) > 2 and codes[-1][0] != "equal":
        codes.pop()
    return [(name, i + a, i + b, j + c, j + d) for name, a, b, c, d in codes]


def all_blocks(want: Sequence[Hashable], have: Sequence[Hashable]) -> Iterator[Block]:
    """Yield blocks that cover two sequences of any length, in order; the time grows with their length."""
    i = j = 0
    while i < len(want) or j < len(have):
        if same := equal_beginning(want, have, (i, j)):
            yield "equal", i, i + same, j, j + same
            i, j = i + same, j + same
        else:
            found = window_blocks(want, have, (i, j))
            yield from found
            i, j = found[-1][2], found[-1][4]


def least_changes(want: Sequence[Hashable], have: Sequence[Hashable]) -> list[Block]:
    """Return the blocks of two short sequences with the fewest items left out or put in.

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
        code = "replace" if i > start[0] and j > start[1] else "delete" if i > start[0] else "insert"
        blocks.append((code, start[0], i, start[1], j))
    return blocks


def label_word(ids: Sequence[int], labels: Sequence[int] | None, index: int) -> str:
    """Return a label for people: `train`, `-100`, `train 5` for the id of another token; `?` if there is none.

    Without labels it is empty.
    """
    if labels is None:
        return ""
    if index >= len(labels):
        return "?"
    if labels[index] == IGNORE_INDEX:
        return "-100"
    return "train" if labels[index] == ids[index] else f"train {labels[index]}"


def is_control(piece: str) -> bool:
    """Return whether a piece of a vocabulary is spelled like a control token."""
    return _CONTROL.fullmatch(piece) is not None


def visible(text: str) -> str:
    """Return a text on one line, in which spaces, newlines and characters that cannot be printed can be seen."""
    if text in _VISIBLE:
        return _VISIBLE[text]
    return "".join(_VISIBLE.get(one) or (one if one.isprintable() else repr(one)[1:-1]) for one in text)


def plain_text(piece: str) -> str:
    """Return the text of a piece as every vocabulary spells it: SentencePiece has spaces and bytes of its own."""
    if _BYTE.fullmatch(piece):
        return spelled_bytes(bytes([int(piece[3:5], 16)]))
    return piece.replace("▁", " ")


def spelled_bytes(data: bytes) -> str:
    r"""Return bytes as text, in which those that are only a part of a character are spelled as `\xf0`."""
    return data.decode("utf-8", "backslashreplace")


def piece_units(pieces: Iterable[str]) -> list[str]:
    """Return pieces of a vocabulary as control tokens, bytes and single characters."""
    units: list[str] = []
    for piece in pieces:
        if is_control(piece) or _BYTE.fullmatch(piece):
            units.append("\n" if piece == "<0x0A>" else piece)
        else:
            units += piece.replace("▁", " ")
    return units


def units_shape(before: str, expected: Sequence[str], found: Sequence[str]) -> str:
    """Return the shape of the difference between two lists of control tokens and characters; empty if they are equal.

    Args:
        before: The control token before them; empty at the start.
        expected: mistral-common's side; a text is a list of its characters.
        found: The side to compare with it.
    """
    start = equal_beginning(expected, found)
    least = min(len(expected), len(found)) - start
    end = next((n for n in range(least) if expected[-1 - n] != found[-1 - n]), least)
    sides = [side[start : len(side) - end] for side in (expected, found)]
    if not any(sides):
        return ""
    changed = " → ".join(_describe(side) for side in sides)
    if any(is_control(unit) for side in sides for unit in side):
        return changed
    before = next((unit for unit in reversed(expected[:start]) if is_control(unit)), before)
    return f"after {before or 'the start'}: {changed}"


def _describe(units: Sequence[str]) -> str:
    """Return control tokens by name, white space as it is, and any other text as the word `text`."""
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
