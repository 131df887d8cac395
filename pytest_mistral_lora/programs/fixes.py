"""The fix of each rule in the words of a program, from a TOML file beside it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from pytest_mistral_lora.errors import EntryPointError


@cache
def fixes_in(file: Path) -> Mapping[str, Mapping[str, str]]:
    """Return the fixes of a file, by section and rule; a line may be of several rules.

    Raises:
        EntryPointError: If it cannot be read, or is no TOML.
    """
    try:
        sections: dict[str, dict[str, str]] = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise EntryPointError(f"not valid TOML: {error}", place=str(file)) from error
    except OSError as error:
        raise EntryPointError(f"cannot be read: {error.strerror}", place=str(file)) from error
    return {
        name: {rule: fix for rules, fix in fixes.items() for rule in rules.split()} for name, fixes in sections.items()
    }
