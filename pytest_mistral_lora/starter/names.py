"""Names of a user in the files that `init` writes: refused, or written by the YAML library."""

from __future__ import annotations

import unicodedata
from typing import Any

import yaml

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import Place

_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})
"""The classes of characters that change the direction of the following text, and so its displayed order."""


def require_plain(name: str, place: Place) -> None:
    """Refuse a name that cannot be one line of text in the written files.

    Args:
        name: The name of a base, or of data.
        place: The argument or the field that has it.

    Raises:
        InputError: If it has a line end or another control character, half of a surrogate pair (from a file's name that
            is not UTF-8), or a character that changes the direction of text.
    """
    for letter in name:
        is_control = unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp")
        if is_control or unicodedata.bidirectional(letter) in _TURNING:
            raise InputError(
                f"the name {name!a} has the character U+{ord(letter):04X}",
                place=place,
                expected="a name of one line, without control characters",
                next_step="Rename it, or name a link to it.",
            )


def yaml_text(value: Any) -> str:
    """Return a name, or a mapping of names, as YAML on one line, quoted where needed, also within braces."""
    options: Any = {"allow_unicode": True, "width": float("inf"), "default_flow_style": True, "sort_keys": False}
    return str(yaml.safe_dump([value], **options)).strip()[1:-1]
