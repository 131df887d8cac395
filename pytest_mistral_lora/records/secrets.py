"""Keep secrets out of texts: values of the environment, tokens, passwords in addresses, and the key of a server."""

from __future__ import annotations

import base64
import html
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
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
_NAMED = "&<>\"'"
"""Characters with a name in HTML, which a page must escape."""
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
    or the like; a password, token or signature in an address; and a text in the form of a token. The key of a
    server is also found as a server may echo it: escaped, divided, in base64 or as numbers. The resulting texts can be
    written as UTF-8.
    """
    names = filter(is_secret_name, os.environ)
    values = sorted({os.environ[name] for name in names if len(os.environ[name]) >= _LEAST_LENGTH}, key=len)
    known = re.compile("|".join(map(re.escape, reversed(values)))) if values else None
    key = server_key()
    echoed = _echoes(key) if len(key) >= _LEAST_KEY else None

    def redact(value: Any) -> Any:
        if isinstance(value, str):
            text = known.sub(HIDDEN, value) if known else value
            text = echoed.sub(HIDDEN, text) if echoed else text
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


@cache
def _echoes(key: str) -> re.Pattern[str]:
    """Return a pattern of the spellings of a key: each character plain or escaped, and the key in base64 and hex."""
    letters = []
    for letter in key:
        code = ord(letter)
        # JSON escapes a slash or a quotation mark by one backslash, and within a text in JSON by more
        escaped = rf"\\{{0,8}}(?:{re.escape(letter)}|u00{code:02x}|x{code:02x})"
        entity = html.escape(letter) if letter in _NAMED else f"&#{code};"
        letters.append(f"(?:{escaped}|%(?:25)?{code:02x}|&#0{{0,4}}(?:{code}|x0{{0,4}}{code:x});|{entity})")
    # white space and invisible characters may divide it
    divided = r"[\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]{0,8}".join(letters)
    forms = [divided, "[ ,]*".join(f"{ord(letter):02x}" for letter in key)]
    for shift in range(3):
        # the digits that depend only on the key, at any place in the encoded text
        start, end = -(-shift * 8 // 6), (shift + len(key)) * 8 // 6
        digits = base64.b64encode(b"\0" * shift + key.encode())[start:end].decode()
        for form in {digits, digits.translate(str.maketrans("+/", "-_"))} if len(digits) > _LEAST_KEY else ():
            forms.append(f"(?-i:{re.escape(form)})[A-Za-z0-9+/_=-]*")
    return re.compile("|".join(forms), re.IGNORECASE)


def spells_secret(row: TokenRow) -> bool:
    """Return whether the tokens of a row spell a secret, which cannot be replaced in them."""
    columns = [column.tokens for column in row.columns]
    texts = ("".join(plain_text(token.piece) for token in side if token) for side in zip(*columns, strict=True))
    return any(map(holds_secret, (*texts, row.title)))
