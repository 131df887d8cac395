"""A row without its texts: letters, digits and names are replaced, and lengths, spaces, marks and control tokens stay.

>>> Scrubber().text("See [INST] at 10 o'clock, Zoë!")
"Xxx [INST] xx 00 x'xxxxx, Xxé!"
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

_LIKE_CONTROL = re.compile(r"\[/?[A-Z][A-Z_]*\]|</?s>|<unk>|<pad>|<SPECIAL_\d+>")
"""What spells a control token, where the tokenizer is not known."""
_LETTERS = {
    "CYRILLIC": "\u0445",
    "GREEK": "\u03c7",
    "CJK": "\u4e00",
    "HIRAGANA": "\u306e",
    "KATAKANA": "\u30ce",
    "HANGUL": "\ud558",
    "ARABIC": "\u0633",
    "HEBREW": "\u05d0",
    "DEVANAGARI": "\u0915",
    "THAI": "\u0e01",
    "LATIN": "\u00e9",
}
"""The letter that stands for every letter of a script, by the first word of the names of its letters."""

_KEPT_VALUES = frozenset({"role", "type", "format", "$schema", "reasoning_effort", "weight", "strict", "index", "from"})
"""Keys whose values are words or numbers of the format, and not of a user."""
_NAMES = frozenset({"name", "id", "tool_call_id", "required", "enum"})
"""Keys whose values are names: equal ones stay equal, and different ones stay different."""
_OF_ROWS = (
    *("messages", "prompt", "completion", "chosen", "rejected", "suffix", "label", "conversations", "value"),
    *("instruction", "input", "output", "content", "text", "thinking", "closed", "tools", "tool_calls", "function"),
    *("arguments", "parameters", "response_format", "json_schema", "schema", "chat_template_kwargs"),
)
_OFSCHEMAS = ("properties", "description", "items", "anyOf", "oneOf", "allOf", "additionalProperties", "default")
_LIMITS = ("minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems", "uniqueItems")
_KNOWN_KEYS = frozenset((*_OF_ROWS, *_OFSCHEMAS, *_LIMITS)) | _KEPT_VALUES | _NAMES
SCHEMAS = frozenset({"tools", "response_format"})
"""Keys whose values have a schema, in which numbers and types stay."""
Part: TypeAlias = Literal["row", "schema", "private"]
"""What a value belongs to: in a schema, numbers and types stay; what is private has no word of the format."""


class Scrubber:
    """Replaces the texts of one chat row; equal names get equal replacements."""

    def __init__(self, oracle: Oracle | None = None) -> None:
        """Begin a row.

        Args:
            oracle: The tokenizer, whose control tokens stay; None if it is not known.
        """
        self._control = _LIKE_CONTROL if oracle is None else oracle.control_pattern
        self._names: dict[str, str] = {}

    def text(self, text: str) -> str:
        """Return a text with other letters and digits; what spells a control token stays."""
        kept = [(found.start(), found.end()) for found in self._control.finditer(text)]
        parts, at = [], 0
        for start, end in kept:
            parts += [_scrubbed(text[at:start]), text[start:end]]
            at = end
        return "".join([*parts, _scrubbed(text[at:])])

    def name(self, name: str) -> str:
        """Return a name of the same length, the same for equal names, and different for different ones if it can be."""
        if name not in self._names:
            used, plain = {*self._names.values()}, _scrubbed(name)
            # the last letters count: call ids must have nine characters and differ
            endings = map(_letters, count())
            other = (plain[: max(0, len(plain) - len(end))] + end for end in endings)
            self._names[name] = plain if plain not in used else next(text for text in other if text not in used)
        return self._names[name]

    def row(self, row: Any) -> Any:
        """Return a record of chat rows without its texts."""
        return self.value(row, "", "row")

    def value(self, value: Any, key: str, part: Part) -> Any:
        """Return a value without its texts.

        Args:
            value: The value.
            key: The key of the mapping that it stands in, or that its list stands in.
            part: What it belongs to.
        """
        if isinstance(value, dict):
            return dict(self.item(name, item, key, part) for name, item in value.items())
        if isinstance(value, list):
            return [self.value(item, key, part) for item in value]
        if value is None or isinstance(value, bool) or (part != "private" and key in _KEPT_VALUES):
            return value
        if isinstance(value, str):
            return self._string(value, key, part)
        return value if part == "schema" else _scrubbed_number(value)

    def item(self, name: str, value: Any, key: str, part: Part) -> tuple[str, Any]:
        """Return an item of the mapping at `key`, whose name stays if it is a word of the format."""
        if part == "schema" and key == "properties":
            return self.name(name), self.value(value, "", part)
        if part == "private" or name not in _KNOWN_KEYS:
            return self.name(name), self.value(value, "", "private")
        if name == "arguments" and isinstance(value, dict):
            return name, self.value(value, "", "private")
        return name, self.value(value, name, "schema" if name in SCHEMAS else part)

    def _string(self, value: str, key: str, part: Part) -> str:
        if part != "private" and key in _NAMES:
            return self.name(value)
        if key == "arguments":
            try:
                parsed = json.loads(value)
            except ValueError:
                return self.text(value)
            if isinstance(parsed, dict):
                return json.dumps(self.value(parsed, "", "private"), ensure_ascii=False)
        return self.text(value)


def _letters(number: int) -> str:
    """Return a number in letters, from `a` to `z`, then `ba` and on."""
    text = ""
    while True:
        number, digit = divmod(number, 26)
        text = chr(ord("a") + digit) + text
        if not number:
            return text


def _scrubbed(text: str) -> str:
    return "".join(map(_like, text))


@cache
def _like(character: str) -> str:
    """Return the character that stands for every one of its kind: a letter of its script and case, or a digit."""
    kind = unicodedata.category(character)
    if kind in ("Nd", "Nl", "No"):
        return "0"
    if kind[0] != "L":
        return character
    if character.isascii():
        return "X" if character.isupper() else "x"
    script = unicodedata.name(character, "").partition(" ")[0].partition("-")[0]
    letter = _LETTERS.get(script, "x")
    return letter.upper() if character.isupper() else letter


def _scrubbed_number(value: float) -> float:
    if isinstance(value, int):
        return int(re.sub(r"\d", "1", str(value)))
    return -1.5 if value < 0 else 1.5
