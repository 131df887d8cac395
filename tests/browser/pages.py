"""Names that the tests in a browser share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Page

WIDE, NARROW = 1280, 420
"""Widths of a page that people use, in CSS pixels."""

OpenPage = Callable[..., "Page"]
"""Opens a file: `open_page(path, width=NARROW, scheme="dark", script=False)`."""


def sideways_scroll(page: Page) -> int:
    """Return by how many pixels a page is wider than its window."""
    return int(page.evaluate("document.documentElement.scrollWidth - window.innerWidth"))


def open_every_part(page: Page) -> None:
    """Open the parts of a page that are closed: they have faults, too."""
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
