"""Keep secrets out of texts: values of the environment, tokens, passwords in addresses, and the key of a server."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pytest_mistral_lora.chat.pieces import plain_text
from pytest_mistral_lora.chat.token_rows import TokenRow

_T = TypeVar("_T")

HIDDEN = "***"
"""The text that replaces a secret."""

SERVER_KEY = "MISTRAL_SERVER_KEY"
"""The environment variable of a server's key; its value is sent to the server, and printed nowhere."""

_SECRET_NAME = re.compile(r"(?<!TIK)TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|KEY$|_PAT$", re.IGNORECASE)
# a shorter value, such as `true` or `none`, is an ordinary word in other texts
_LEAST_LENGTH = 8
_LEAST_KEY = 4
_PATTERNS = (
    # user and password, or a token in their place: https://user:token@host/
    (re.compile(r"(?<=://)[^/\s'\"]+(?=@)"), HIDDEN),
    (re.compile(r"([?&][\w.-]*(?:token|key|secret|password|passwd|signature|sig)=)[^&\s'\"#]+", re.I), rf"\1{HIDDEN}"),
    # tokens of the Hub, GitHub, GitLab, and of servers with OpenAI's API
    (re.compile(r"\b(?:hf|gh[pousr]|github_pat)_\w{20,}|\bglpat-[\w-]{20,}|\bsk-[\w-]{20,}"), HIDDEN),
    (re.compile(r"(\bBearer )[\w.~+/=-]{8,}", re.I), rf"\1{HIDDEN}"),
)


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable has the name of a secret, such as `HF_TOKEN`."""
    return bool(_SECRET_NAME.search(name))


def server_key() -> str:
    """Return the key of the server, without the line break at the end of a file; empty if it is not set."""
    return os.environ.get(SERVER_KEY, "").strip()


@contextmanager
def key_from(variable: str) -> Iterator[None]:
    """Send the key of another variable to servers, which is then hidden as that of `SERVER_KEY` is.

    Args:
        variable: The name of the variable; empty to send no key.
    """
    before = os.environ.get(SERVER_KEY)
    os.environ[SERVER_KEY] = os.environ.get(variable, "")
    try:
        yield
    finally:
        if before is None:
            del os.environ[SERVER_KEY]
        else:
            os.environ[SERVER_KEY] = before


def redacted(data: _T) -> _T:
    """Return plain data, or a text, with `***` in place of each secret in its texts.

    A secret is the value of an environment variable whose name ends in `KEY` or contains `TOKEN`, `SECRET`, `PASSW`
    or the like, and the key of a server; a password, token or signature in an address; and a text in the form of a
    token. The resulting texts can be written as UTF-8.
    """
    names = filter(is_secret_name, os.environ)
    values = {os.environ[name] for name in names if len(os.environ[name]) >= _LEAST_LENGTH}
    values |= {key for key in (server_key(),) if len(key) >= _LEAST_KEY}
    known = re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True)))) if values else None

    def redact(value: Any) -> Any:
        if isinstance(value, str):
            text = known.sub(HIDDEN, value) if known else value
            for pattern, replacement in _PATTERNS:
                text = pattern.sub(replacement, text)
            return _writable(text)
        if isinstance(value, dict):
            return {redact(key): redact(item) for key, item in value.items()}
        return [redact(item) for item in value] if isinstance(value, list | tuple) else value

    result: _T = redact(data)
    return result


def _writable(text: str) -> str:
    """Return a text that can be written as UTF-8: a name of a file, or a cut JSON escape, may have half a character."""
    return text.encode("utf-8", "backslashreplace").decode()


def holds_secret(text: str) -> bool:
    """Return whether `redacted` replaces a secret in a text."""
    return redacted(text) != _writable(text)


def spells_secret(row: TokenRow) -> bool:
    """Return whether the tokens of a row spell a secret, which cannot be replaced in them."""
    columns = [column.tokens for column in row.columns]
    texts = ("".join(plain_text(token.piece) for token in side if token) for side in zip(*columns, strict=True))
    return any(map(holds_secret, (*texts, row.title)))
