"""The likeness of rows: what is left of their texts without spaces, case, punctuation and Unicode form."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from typing import Any

from pytest_mistral_lora.chat.reading import loads_strict
from pytest_mistral_lora.chat.rows import Row, compact_json, text_of
from pytest_mistral_lora.errors import counted

LIKENESS_BYTES = 16


def row_likeness(row: Row) -> bytes:
    """Return a digest that ignores spaces, case, punctuation and Unicode form of a row's texts.

    The same holds for texts in the arguments of calls, whose keys may come in any order. Roles and tools count
    unchanged, and so does a text of nothing but punctuation.
    """
    *_, whole = _likenesses(row)
    return whole


def shared_rows(held_out: AbstractSet[bytes], others: AbstractSet[bytes]) -> str:
    """Return how rows of other subjects are the held-out ones, in words; empty if both sides have rows of their own.

    Args:
        held_out: The likeness of each held-out row.
        others: Those of the rows of other subjects.
    """
    if held_out and held_out <= others:
        return f"its rows have each of the {counted(len(held_out), 'held-out row')}"
    return f"each of its {counted(len(others), 'row')} is held out" if others and others <= held_out else ""


def conversation_numbers(rows: Iterable[Row]) -> list[int]:
    """Return the number of each row's conversation, in order of the first rows.

    A conversation is an observation of a statistic. Rows with the prompt of another row are of its conversation,
    whatever their answers: a copy, or one of several answers. So is a row that another one goes on with, as where each
    answer of a conversation is a row of its own.

    Args:
        rows: The rows; an iterator of them is read once.
    """
    last_prompts: list[bytes] = []
    goes_on: dict[bytes, bytes] = {}
    for row in rows:
        *earlier, last = _prompts(row)
        last_prompts.append(last)
        for prompt in earlier:
            # of several rows the one with the least digest, so that the order of the rows changes nothing
            goes_on[prompt] = min(goes_on.get(prompt, last), last)
    numbers: dict[bytes, int] = {}
    return [numbers.setdefault(_end(prompt, goes_on), len(numbers)) for prompt in last_prompts]


def _end(prompt: bytes, goes_on: Mapping[bytes, bytes]) -> bytes:
    while prompt in goes_on:  # each step leads to a longer prompt
        prompt = goes_on[prompt]
    return prompt


def _prompts(row: Row) -> list[bytes]:
    """Return the likeness of what each answer follows; of the whole row if it asks nothing."""
    likenesses = list(_likenesses(row))
    roles = ("system", *row.kind.answer_roles)
    asked = (index for index, message in enumerate(row.messages) if message["role"] not in roles)
    first = next(asked, len(row.messages))
    prompts = [likenesses[group[0]] for group in row.assistant_groups() if group[0] > first]
    return prompts or likenesses[-1:]


def _likenesses(row: Row) -> Iterator[bytes]:
    """Yield the likeness of what is before each message, and at last that of the row."""
    digest = hashlib.blake2b(digest_size=LIKENESS_BYTES)
    digest.update(compact_json([row.tools or (), row.response_format]).encode())
    for message in row.messages:
        yield digest.digest()
        calls = []
        for call in message.get("tool_calls") or ():
            arguments = call["function"].get("arguments")
            if isinstance(arguments, str):
                with suppress(ValueError):  # a text that is not strict JSON, such as one with NaN, counts as a text
                    arguments = loads_strict(arguments)
            calls.append((call["function"]["name"], without_form(arguments)))
        likeness = [message["role"], without_form(text_of(message.get("content"))), calls]
        digest.update(b"\0" + compact_json(likeness).encode())
    yield digest.digest()


# a sign of a number: 3.14 is not 314, and -5 not 5
# (the sign first, and then what is beside it: a pattern that begins with a look behind stops at every character)
_OF_NUMBER = re.compile(r"[.,:/-](?=\d)(?:(?<=\d[.,:/])|(?<=-)(?<!\w-))")

# Markdown's **bold** and *italic*; not the signs of 2**3 and a*b
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]+)(?<=[^\s*])\1(?![\w*])")


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
_ASCII = bytes(range(128))


def beyond_ascii(text: str) -> str:
    """Return the characters of a text that are not ASCII."""
    return text.encode().translate(None, _ASCII).decode()


def _kept(text: str) -> str:
    """Return `text.translate(_KEPT)`, in a tenth of the time for a text that is mostly ASCII."""
    left = text.encode().translate(None, _ASCII_DROPPED).decode()
    for character in {*beyond_ascii(left)} if not left.isascii() else ():
        if _KEPT[ord(character)] is None:
            left = left.replace(character, "")
    return left


def without_form(value: Any) -> Any:
    """Return a text without its form, or a value of JSON with such texts, its keys in order."""
    if isinstance(value, Mapping):
        return {key: without_form(value[key]) for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [without_form(item) for item in value]
    if not isinstance(value, str):
        return value
    text = unicodedata.normalize("NFKC", value).casefold()
    # a pattern that begins with a look behind stops at every character
    text = _EMPHASIS.sub(r"\2", text) if "*" in text else text
    # letters of no script stand for the signs of numbers, which would be dropped
    signed = _OF_NUMBER.sub(lambda found: f"\u2295{ord(found[0])}\u2295", text)
    return _kept(unicodedata.normalize("NFKC", signed)) or text
