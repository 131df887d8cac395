"""Show where two encodings part: the first differing token with five on each side, and who is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX

AROUND = 5
"""Tokens shown on each side of the first difference."""

Ids = Sequence[int]
Labels = Sequence[int] | None


def show_difference(expected: tuple[Ids, Labels], found: tuple[Ids, Labels], piece: Callable[[int], str]) -> str:
    """Return a table of the tokens around the first difference in ids or labels; empty if there is none.

    Args:
        expected: `input_ids` and `labels` as they should be; labels of None are not compared.
        found: `input_ids` and `labels` as they are.
        piece: Gives the vocabulary's spelling of an id.
    """
    at = first_difference(expected, found)
    if at is None:
        return ""
    rows = [("token", "expected", "label", "found", "label")]
    for index in range(max(0, at - AROUND), min(max(len(expected[0]), len(found[0])), at + AROUND + 1)):
        mark = "> " if index == at else "  "
        rows.append((f"{mark}{index}", *_cell(expected, index, piece), *_cell(found, index, piece)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lengths = f"{len(expected[0])} tokens expected, {len(found[0])} found; the first difference is at token {at}"
    return "\n".join([lengths, *lines])


def first_difference(expected: tuple[Ids, Labels], found: tuple[Ids, Labels]) -> int | None:
    """Return the first index where ids, or labels if both have them, differ; None if nowhere."""
    for index in range(max(len(expected[0]), len(found[0]))):
        if index >= min(len(expected[0]), len(found[0])) or expected[0][index] != found[0][index]:
            return index
        if expected[1] is not None and found[1] is not None and expected[1][index] != found[1][index]:
            return index
    return None


def _cell(encoded: tuple[Ids, Labels], index: int, piece: Callable[[int], str]) -> tuple[str, str]:
    ids, labels = encoded
    if index >= len(ids):
        return "(end)", ""
    token = f"{ids[index]} {piece(ids[index])!r}"
    if labels is None or index >= len(labels):
        return token, "?"
    if labels[index] == IGNORE_INDEX:
        return token, "-100"
    return token, "train" if labels[index] == ids[index] else f"train {labels[index]}"
