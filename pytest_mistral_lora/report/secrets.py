"""Secrets are kept out of reports: values of the environment, tokens, and the passwords in addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pytest_mistral_lora.chat.difference import plain_text
from pytest_mistral_lora.chat.token_rows import TokenRow

_T = TypeVar("_T")

HIDDEN = "***"
"""Stands in place of a secret."""

_NOT_SHOWN = "tokens are not shown: they spell a secret"

_SECRET_NAME = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|KEY$|_PAT$", re.IGNORECASE)
# a shorter value, such as `true` or `none`, is an ordinary word of other texts, too
_LEAST_LENGTH = 8
_PATTERNS = (
    # user and password, or a token in their place: https://user:token@host/
    (re.compile(r"(?<=://)[^/\s'\"]+(?=@)"), HIDDEN),
    (re.compile(r"([?&][\w.-]*(?:token|key|secret|password|passwd|signature|sig)=)[^&\s'\"#]+", re.I), rf"\1{HIDDEN}"),
    # tokens of the Hub, GitHub, GitLab, and of servers with OpenAI's API
    (re.compile(r"\b(?:hf|gh[pousr]|github_pat)_\w{20,}|\bglpat-[\w-]{20,}|\bsk-[\w-]{20,}"), HIDDEN),
    (re.compile(r"(\bBearer )[\w.~+/=-]{8,}", re.I), rf"\1{HIDDEN}"),
)


def redacted(data: _T) -> _T:
    """Return plain data, or a text, with `***` in place of each secret in its texts.

    A secret is the value of an environment variable whose name ends in `KEY` or contains `TOKEN`, `SECRET`, `PASSW`
    or the like; a password, token or signature in an address; and a text that has the form of a token. The texts can
    be written as UTF-8 then.
    """
    names = (name for name in os.environ if _SECRET_NAME.search(name))
    values = sorted({os.environ[name] for name in names if len(os.environ[name]) >= _LEAST_LENGTH}, key=len)
    known = re.compile("|".join(map(re.escape, reversed(values)))) if values else None

    def redact(value: Any) -> Any:
        if isinstance(value, str):
            text = known.sub(HIDDEN, value) if known else value
            for pattern, replacement in _PATTERNS:
                text = pattern.sub(replacement, text)
            # half a character, as a cut JSON escape leaves it, cannot be written as UTF-8
            return text.encode("utf-8", "backslashreplace").decode()
        if isinstance(value, dict):
            return {redact(key): redact(one) for key, one in value.items()}
        return [redact(one) for one in value] if isinstance(value, list | tuple) else value

    result: _T = redact(data)
    return result


def spells_secret(row: TokenRow) -> bool:
    """Return whether the tokens of a row spell a secret, which cannot be replaced in them."""
    columns = [one.tokens for one in row.columns]
    texts = ("".join(plain_text(one.piece) for one in side if one) for side in zip(*columns, strict=True))
    return any(redacted(text) != text for text in (*texts, row.title))


def public_finding(finding: Mapping[str, Any]) -> dict[str, Any]:
    """Return a finding or a cause as plain data without the tokens that spell a secret, in which it has no text."""
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
    # a long row is not kept with its finding, and the tokens are only a part of one
    return redacted(finding["row"]) != finding["row"] or bool(tokens and spells_secret(TokenRow.from_json(tokens)))
