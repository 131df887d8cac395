"""The answer of a request, or why there is none; and the finding of one that failed, in the server's words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.serving.answers import ServedAnswer
    from pytest_mistral_lora.serving.replay import Outcome

_WORDS = 400
"""Most characters of a cause: a server may quote its template."""

_TEMPLATE_FAILED = re.compile(r"While executing|[Tt]emplate|\b[Jj]inja2?\b|' is undefined")
_READ_LOG = (
    "Read the log of the server for the reason: it is a fault of the engine, or of libraries that do not fit together, "
    "and no template mends it."
)


_OF_GATEWAY = re.compile(r"HTTP 50[24]\b")
"""The statuses of a gateway that gets no answer, or a broken one, from the server behind it."""

_NOT_REACHED = (
    "The gateway gets no answer from the server behind it: see whether it still runs, and how long it may take."
)


def cause_of(words: str) -> str:
    """Return the part of a server's words that is the same for each row, without numbers and quoted texts."""
    return re.sub(r"'[^']*'", "'…'", re.sub(r"[0-9]+", "#", words))[:_WORDS]


def failure_finding(name: str, words: str, place: Place, row: str) -> Finding:
    """Return the finding of a failed request.

    Args:
        name: The name of the row.
        words: The HTTP status and the words of the server.
        place: The address.
        row: The row as JSON.
    """
    # an exception without a message may come from the template
    fix = "" if _TEMPLATE_FAILED.search(words) or "without a reason" in words else _READ_LOG
    fix = _NOT_REACHED if _OF_GATEWAY.match(words) else fix
    found = f"{name}: the request fails: {words}"
    return Finding("ML919", found, place, "an answer", row=row, shape=cause_of(words), fix=fix)


_CONTEXT = re.compile(
    r"available context size|context (?:length|window|size) (?:of|is|exceeded)|exceeds? (?:the |its )?(?:\w+ )?context"
    r"|maximum context length|maximum model length|max_model_len|context_length_exceeded|prompt is too long",
    re.IGNORECASE,
)
"""The words of servers whose context is too small for a prompt."""


def is_about_context(words: str) -> bool:
    """Return whether a server refuses a prompt because it is longer than its context."""
    return _CONTEXT.search(words) is not None


_SETTING = re.compile(
    r"\b(?:temperature|top_[pkn]|min_p|\w+_penalty|\w+_tokens|\w*logprobs|logit_bias|seed)\b.{0,20}"
    r" (?:must be|should be)\b"
)
"""The words of servers for a setting of sampling that they refuse."""


def is_about_setting(words: str) -> bool:
    """Return whether a server refuses a setting of the request, and not its messages."""
    return _SETTING.search(words) is not None


def answered(outcome: Outcome) -> ServedAnswer | None:
    """Return the answer of a request; None if it was not sent, has no answer, was refused or failed."""
    if outcome is None or isinstance(outcome, InputError) or outcome.refused or outcome.failed:
        return None
    return outcome


def no_answer(outcome: Outcome) -> str:
    """Return why a request has no answer; empty if it has one, or was not sent."""
    if isinstance(outcome, InputError):
        expected = f"; expected {outcome.expected}" if outcome.expected else ""
        return f"{outcome.found}{expected} ({outcome.place})"
    if outcome is None:
        return ""
    if outcome.failed:
        return f"the request fails: {outcome.failed}"
    return f"the server refuses it: {outcome.refused}" if outcome.refused else ""
