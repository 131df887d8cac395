"""The part of a generated text that is its author's: between two marks, kept when the text is made again."""

from __future__ import annotations

_BEGIN = "<!-- yours, from here: kept when this file is made again -->"
_END = "<!-- yours, to here -->"


def empty_part() -> str:
    """Return the marks with nothing between them, for a text in the making."""
    return f"{_BEGIN}\n\n{_END}"


def own_part(text: str) -> str:
    """Return what an author wrote between the marks; empty where there is nothing, or no marks."""
    _, begin, rest = text.partition(_BEGIN)
    own, end, _ = rest.rpartition(_END)
    return own.strip() if begin and end else ""


def with_own_part(text: str, own: str) -> str:
    """Return a text with this part as the author's; a text without the marks as it is."""
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.rpartition(_END)
    if not begin or not end:
        return text
    return f"{before}{_BEGIN}\n\n{own}\n\n{_END}{after}" if own else f"{before}{empty_part()}{after}"
