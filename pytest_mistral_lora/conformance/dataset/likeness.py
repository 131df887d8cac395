"""Digests and sketches by which rows are alike, equal but for their form or nearly; and the script of a row."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from functools import cache

from pytest_mistral_lora.chat.rows import Row, compact_json, text_of
from pytest_mistral_lora.conformance.dataset.tally import DIGEST_BYTES, SKETCH_BYTES
from pytest_mistral_lora.extras import is_installed

# a sign of a number: 3.14 is not 314, and -5 not 5
# (the sign before the digit beside it, because a pattern that begins with a look behind stops at every character)
_OF_NUMBER = re.compile(r"[.,:/](?<=\d[.,:/])(?=\d)|-(?<!\w-)(?=\d)")


class _Kept(dict[int, int | None]):
    """For `str.translate`: a character to itself, or to nothing if it is a space, a control or sentence punctuation."""

    def __missing__(self, code: int) -> int | None:
        kind = unicodedata.category(chr(code))
        # brackets and signs of code count: f(x) is not f[x], and C# not C
        is_dropped = kind[0] in "ZC" or (kind in ("Po", "Pd", "Pi", "Pf") and chr(code) not in "#%&@*/\\")
        self[code] = None if is_dropped else code
        return self[code]


_KEPT = _Kept()
_ASCII_DROPPED = bytes(code for code in range(128) if _KEPT[code] is None)
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")


def _kept(text: str) -> str:
    """Return `text.translate(_KEPT)`, in a tenth of the time for a text that is mostly ASCII."""
    left = text.encode().translate(None, _ASCII_DROPPED).decode()
    return left if left.isascii() else _BEYOND_ASCII.sub(lambda run: run[0].translate(_KEPT), left)


def row_likeness(row: Row) -> bytes:
    """Return a digest that is equal for rows whose texts are, but for spaces, case, punctuation and Unicode form.

    Roles, tool calls and tools count as they are. A text of nothing but punctuation counts as a whole.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for message in row.messages:
        text = unicodedata.normalize("NFKC", text_of(message.get("content"))).casefold()
        # letters of no script stand for the signs of numbers, which would be dropped
        signed = _OF_NUMBER.sub(lambda found: f"\u2295{ord(found[0])}\u2295", text)
        kept = _kept(unicodedata.normalize("NFKC", signed))
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        digest.update(compact_json([message["role"], kept or text, calls]).encode())
    digest.update(compact_json([list(row.tools or ()), row.response_format]).encode())
    return digest.digest()


NO_SCRIPT = "no letters"
# Python has no scripts of characters, but a letter's name begins with it: OLD PERSIAN SIGN A, KATAKANA-HIRAGANA …
_AFTER_SCRIPT = re.compile(r"(?: (?:CAPITAL|SMALL|LETTER|SIGN|SYLLABLE|CHARACTER|UNIFIED|ITERATION|CLOSING)|-).*")
_SCRIPTS = {"Cjk": "Han", "Ideographic": "Han", "Hiragana": "Kana", "Katakana": "Kana", "Modifier": ""}
"""Scripts by the first word of a letter's name, for those that have another name."""


def main_script(row: Row) -> str:
    """Return the Unicode script, such as `Latin` or `Han`, that most of the different letters of a row belong to.

    Kana count before Han, since Japanese has both.
    """
    letters = set().union(*(text_of(message.get("content")) for message in row.messages))
    scripts = Counter(script for letter in letters if (script := _script_of(letter)))
    if not scripts:
        return NO_SCRIPT
    most = min(scripts, key=lambda script: (-scripts[script], script))
    return "Kana" if most == "Han" and 5 * scripts["Kana"] >= scripts["Han"] else most


@cache  # there are 140,000 letters, and a dataset has some hundreds of them
def _script_of(character: str) -> str:
    """Return the script of a letter; nothing for another character."""
    if not character.isalpha():
        return ""
    # a wide or a mathematical letter is one of its script
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "")
    first = _AFTER_SCRIPT.split(name)[0].title()
    return _SCRIPTS.get(first, first)


NUMBERS_END, ASKED_END = 4, 32
"""End of the digest of a row's numbers in its sketch, and of the part of its questions; its answers are the rest."""

_RUN = 3
_FEW_WORDS = 8
# scripts without spaces between words, whose letters count as words: Thai, Lao, Burmese, Khmer, kana, Han
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_NUMBER = re.compile(r"[-+]?\d+(?:[.,:/]\d+)*")


def sketches_available() -> bool:
    """Return whether the library that makes sketches is installed."""
    return is_installed("rensa")


def row_sketch(row: Row) -> bytes:
    """Return a sketch of 64 bytes, by which `near_rows` finds rows that are nearly the same, by MinHash.

    System prompts and tools do not count, since many rows share them. Rows with other numbers are other rows, and so
    are those with another question or answer of fewer than 8 words.
    """
    asked: list[str] = []
    answered: list[str] = []
    fixed: list[str] = []
    for message in row.messages:
        if message["role"] == "system":
            continue
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        text = text_of(message.get("content")) + (compact_json(calls) if calls else "")
        folded = (text if text.isascii() else unicodedata.normalize("NFKC", text)).casefold()
        (answered if message["role"] == "assistant" else asked).extend(_WORD.findall(folded))
        fixed += [message["role"], *_NUMBER.findall(folded)]
    if max(len(asked), len(answered)) < _FEW_WORDS:
        fixed.append(row.to_jsonl())  # too short to be near: under another system prompt, "Hello" is another row
    numbers = hashlib.blake2b(" ".join(fixed).encode(), digest_size=NUMBERS_END).digest()
    return numbers + _part(asked, ASKED_END - NUMBERS_END) + _part(answered, SKETCH_BYTES - ASKED_END)


def _part(words: list[str], size: int) -> bytes:
    """Return bytes of which two texts have as large a part in common as of their runs of three words."""
    from rensa import RMinHash

    if len(words) < _FEW_WORDS:
        return hashlib.blake2b(" ".join(words).encode(), digest_size=size).digest()
    sketch = RMinHash(num_perm=size, seed=0)
    sketch.update([" ".join(run) for run in zip(*(words[start:] for start in range(_RUN)), strict=False)])
    # the low byte of each minimum: 1 of 256 is equal by chance (b-bit minwise hashing, Li and König 2010)
    return bytes(minimum & 0xFF for minimum in sketch.digest())
