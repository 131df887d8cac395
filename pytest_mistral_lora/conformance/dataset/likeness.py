"""Rows that are the same but for spaces, case, punctuation or Unicode form."""

from __future__ import annotations

import hashlib
import re
import unicodedata

from pytest_mistral_lora.chat.rows import Row, compact_json, text_of
from pytest_mistral_lora.conformance.dataset.tally import DIGEST_BYTES

# a sign of a number: 3.14 is not 314, and -5 not 5
_OF_NUMBER = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<!\w)-(?=\d)")


class _Kept(dict[int, int | None]):
    """For `str.translate`: a character to itself, or to nothing if it is a space, a control or sentence punctuation."""

    def __missing__(self, code: int) -> int | None:
        kind = unicodedata.category(chr(code))
        # brackets and signs of code count: f(x) is not f[x], and C# not C
        is_dropped = kind[0] in "ZC" or (kind in ("Po", "Pd", "Pi", "Pf") and chr(code) not in "#%&@*/\\")
        self[code] = None if is_dropped else code
        return self[code]


_KEPT = _Kept()


def row_likeness(row: Row) -> bytes:
    """Return a digest that is equal for rows whose texts are, but for spaces, case, punctuation and Unicode form.

    Roles, tool calls and tools count as they are. A text of nothing but punctuation counts as a whole.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for message in row.messages:
        text = unicodedata.normalize("NFKC", text_of(message.get("content"))).casefold()
        # letters of no script stand for the signs of numbers, which would be dropped
        signed = _OF_NUMBER.sub(lambda found: f"\u2295{ord(found[0])}\u2295", text)
        kept = unicodedata.normalize("NFKC", signed).translate(_KEPT)
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        digest.update(compact_json([message["role"], kept or text, calls]).encode())
    digest.update(compact_json([list(row.tools or ()), row.response_format]).encode())
    return digest.digest()
