"""Results for display: a server's words are bounded, without control characters, and without the key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.escaping import printable
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.secrets import redacted, spells_secret

_LONGEST, _LONGEST_TABLE = 2_000, 20_000
"""Most characters of a line, and of the lines below a finding."""
_NOT_SHOWN = "The tokens are not shown: they spell a secret."


def judged_publicly(judge: Callable[[], Result]) -> Result:
    """Run a check of a server, and remove from its result what a hostile server could put there."""
    result = judge()
    facts = tuple((name, _line(text) if isinstance(text, str) else text) for name, text in result.facts)
    return Result(tuple(map(_shown, result.findings)), _line(result.not_checked), facts)


def _shown(finding: Finding) -> Finding:
    if finding.tokens is not None and spells_secret(finding.tokens):
        finding = replace(finding, detail=_NOT_SHOWN, tokens=None)
    return replace(
        finding,
        found=_line(finding.found),
        place=_shown_place(finding.place),
        expected=_line(finding.expected),
        detail=_cut(printable(redacted(finding.detail)), _LONGEST_TABLE),
        shape=_line(finding.shape),
        fix=_line(finding.fix),
    )


def _shown_place(place: Place) -> Place:
    part = tuple(_line(step) if isinstance(step, str) else step for step in place.part)
    return replace(place, source=replace(place.source, name=_line(place.source.name)), part=part)


def _line(text: str) -> str:
    # search for the key before cutting the text: a part of the key would not be found
    return _cut(printable(redacted(text)).replace("\n", "\\n").replace("\t", "\\t"), _LONGEST)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… and {len(text) - most:,} characters more"
