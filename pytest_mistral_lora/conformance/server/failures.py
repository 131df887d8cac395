"""The finding of a failed request, and the cause in the server's words."""

from __future__ import annotations

import re

from pytest_mistral_lora.conformance.finding import Finding

_WORDS = 400
"""Most characters of a cause: a server may quote its template."""

_TEMPLATE_FAILED = re.compile(r"While executing|[Tt]emplate|\b[Jj]inja2?\b|' is undefined")
_READ_LOG = (
    "Read the log of the server for the reason: it is a fault of the engine, or of libraries that do not fit together, "
    "and no template mends it."
)


def cause_of(words: str) -> str:
    """Return the part of a server's words that is the same for each row, without numbers and quoted texts."""
    return re.sub(r"'[^']*'", "'…'", re.sub(r"[0-9]+", "#", words))[:_WORDS]


def failure_finding(name: str, words: str, place: str, row: str) -> Finding:
    """Return the finding of a failed request.

    Args:
        name: The name of the row.
        words: The HTTP status and the words of the server.
        place: The address.
        row: The row as JSON.
    """
    # an exception without a message may come from the template
    fix = "" if _TEMPLATE_FAILED.search(words) or "without a reason" in words else _READ_LOG
    found = f"{name}: the request fails: {words}"
    return Finding("ML919", found, place, "an answer", row=row, shape=cause_of(words), fix=fix)
