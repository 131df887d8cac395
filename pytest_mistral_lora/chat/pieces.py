"""The spelling of a vocabulary's pieces: control tokens, bytes, and texts with visible white space."""

from __future__ import annotations

import re
from collections.abc import Iterable

_CONTROL = re.compile(r"\[/?[A-Z_]{3,}\]|</?s>|<unk>|<pad>|<\|\w+\|>|<SPECIAL_\d+>")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_VISIBLE = {" ": "␣", "▁": "␣", "\n": "⏎", "<0x0A>": "⏎", "\t": "⇥"}


def is_control(piece: str) -> bool:
    """Return whether a piece of a vocabulary is spelled like a control token."""
    return _CONTROL.fullmatch(piece) is not None


def visible(text: str) -> str:
    """Return a text on one line, with visible spaces, newlines and unprintable characters."""
    if text in _VISIBLE:
        return _VISIBLE[text]
    return "".join(_VISIBLE.get(char) or (char if char.isprintable() else repr(char)[1:-1]) for char in text)


def plain_text(piece: str) -> str:
    """Return the text of a piece as every vocabulary spells it: SentencePiece has spaces and bytes of its own."""
    if _BYTE.fullmatch(piece):
        return spelled_bytes(bytes([int(piece[3:5], 16)]))
    return piece.replace("▁", " ")


def spelled_bytes(data: bytes) -> str:
    r"""Return bytes as text; bytes that are only a part of a character are spelled as `\xf0`."""
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
