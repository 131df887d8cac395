"""The finding of a request that fails, and the cause that a server's words name."""

from __future__ import annotations

import re

from pytest_mistral_lora.conformance.finding import Finding

_WORDS = 400
"""Characters of a cause: a server's words are longer if they quote its template."""

_TEMPLATE_FAILED = re.compile(r"While executing|[Tt]emplate|\b[Jj]inja2?\b|' is undefined")
_READ_LOG = (
    "Read the log of the server for the reason: it is a fault of the engine, or of libraries that do not fit together, "
    "and no template mends it."
)


def cause_of(words: str) -> str:
    """Return the part of a server's words that is the same for each row: without numbers, and texts in quotes."""
    return re.sub(r"'[^']*'", "'…'", re.sub(r"[0-9]+", "#", words))[:_WORDS]


def failure_finding(name: str, words: str, place: str, row: str) -> Finding:
    """Return the finding of a request that failed.

    Args:
        name: The name of the row.
        words: The HTTP status and the words of the server.
        place: The address.
        row: The row as JSON.
    """
    # an exception without a word may be one of the template
    fix = "" if _TEMPLATE_FAILED.search(words) or "without a reason" in words else _READ_LOG
    found = f"{name}: the request fails: {words}"
    return Finding("ML919", found, place, "an answer", row=row, shape=cause_of(words), fix=fix)
