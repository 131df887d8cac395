"""Write findings to reports without the tokens that spell a secret, and with redacted texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.records.secrets import holds_secret, redacted, spells_secret

_NOT_SHOWN = "tokens are not shown: they spell a secret"


def public_finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    """Return a finding or a cause as plain data without tokens that spell a secret: no text in them can be redacted."""
    return {**finding, "detail": _NOT_SHOWN, "tokens": None} if _spells(finding) else dict(finding)


def public_text(text: str, findings: Iterable[Mapping[str, Any]]) -> str:
    """Return a text of findings for people without the tables of tokens that spell a secret, and redacted."""
    for finding in findings:
        if finding["detail"] and _spells(finding):
            table = "\n".join(f"  {line}" for line in finding["detail"].splitlines())
            text = text.replace(table, f"  {_NOT_SHOWN}")
    return redacted(text)


def _spells(finding: Mapping[str, Any]) -> bool:
    tokens = finding.get("tokens")
    # a long row is not kept with its finding, and its tokens may be only a part of it
    return holds_secret(finding["row"]) or bool(tokens and spells_secret(TokenRow.from_json(tokens)))
