"""The fix of each rule in the words of a program, from a TOML file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pytest_mistral_lora.chat.reading import read_toml
from pytest_mistral_lora.errors import EntryPointError


@cache
def fixes_in(file: Path) -> Mapping[str, Mapping[str, str]]:
    """Return the fixes of a file, by section and rule; a line may be of several rules.

    Raises:
        EntryPointError: If it cannot be read, or is no TOML.
    """
    sections: dict[str, dict[str, str]] = read_toml(file, EntryPointError)
    return {
        name: {rule: fix for rules, fix in fixes.items() for rule in rules.split()} for name, fixes in sections.items()
    }
