"""The named deviations that are known of a kind of server, from a TOML file beside it: with the versions of each.

    [prompts]
    control-literal = ">=8672"

A deviation itself, what it changes, is in `chat.templates.deviations` (of prompts) and `conformance.answer.deviations`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from packaging.specifiers import InvalidSpecifier, SpecifierSet

from pytest_mistral_lora.chat.reading import read_toml
from pytest_mistral_lora.errors import EntryPointError
from pytest_mistral_lora.places import Place

DeviationsOf = Literal["prompts", "answers"]
"""The sections of a file: what deviates."""


@cache
def deviations_in(file: Path) -> Mapping[str, Mapping[str, SpecifierSet]]:
    """Return the versions of each named deviation of a file, by section and name.

    Raises:
        EntryPointError: If it cannot be read, is no TOML, or has an unknown section or versions that pip does not know.
    """
    sections = read_toml(file, EntryPointError)
    found: dict[str, dict[str, SpecifierSet]] = {}
    for section, versions in sections.items():
        if section not in get_args(DeviationsOf) or not isinstance(versions, dict):
            expected = " or ".join(f"[{name}]" for name in get_args(DeviationsOf))
            raise EntryPointError(f"unknown section {section!r}", place=str(file), expected=expected)
        found[section] = {name: _specifier(file, section, name, text) for name, text in versions.items()}
    return found


def _specifier(file: Path, section: str, name: str, versions: object) -> SpecifierSet:
    try:
        return SpecifierSet(versions if isinstance(versions, str) else repr(versions))
    except InvalidSpecifier:
        place = Place.of(file).within(section, name)
        raise EntryPointError(repr(versions), place=place, expected="versions as pip writes them: '>=0.32'") from None
