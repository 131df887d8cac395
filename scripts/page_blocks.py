"""The parts of pages that scripts make: blocks between `<!-- NAME: start -->` and `<!-- NAME: end -->`."""

from __future__ import annotations


def with_block(page: str, name: str, made: str) -> str:
    """Return the text of a page with what is made for a block; the rest is written by hand.

    Raises:
        ValueError: If the page has no block of this name.
    """
    start, end = (f"<!-- {name}: {side} -->" for side in ("start", "end"))
    head, opened, rest = page.partition(f"{start}\n")
    _, closed, tail = rest.partition(end)
    if not (opened and closed):
        raise ValueError(f"the page has no block {name!r}, from {start} to {end}")
    return f"{head}{opened}{made}\n{closed}{tail}"
