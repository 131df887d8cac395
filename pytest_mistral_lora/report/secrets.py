"""Secrets are kept out of reports: values of the environment, tokens, and the passwords in addresses."""

from __future__ import annotations

import os
import re
from typing import Any, TypeVar

_T = TypeVar("_T")

HIDDEN = "***"
"""Stands in place of a secret."""

_SECRET_NAME = re.compile(r"TOKEN(?!IZ)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|API_?KEY|KEY$|_PAT$", re.IGNORECASE)
# a shorter value, such as `true` or `none`, is an ordinary word of other texts, too
_LEAST_LENGTH = 8
_PATTERNS = (
    # user and password, or a token in their place: https://user:token@host/
    (re.compile(r"(?<=://)[^/\s@'\"]+(?=@)"), HIDDEN),
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
