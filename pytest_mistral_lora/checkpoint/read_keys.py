"""Which keys of a configuration each class of transformers reads: a table of what tiny models showed, by version.

`scripts/record_read_keys.py` runs the models and writes `read_keys.toml`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from packaging.version import Version

from pytest_mistral_lora.chat.reading import read_toml

_RECORD = Path(__file__).with_name("read_keys.toml")


@cache
def _recorded() -> Mapping[Version, Mapping[str, frozenset[str]]]:
    stored = read_toml(_RECORD)
    return {
        Version(version): {name: frozenset(keys) for name, keys in classes.items()}
        for version, classes in stored.items()
    }


def read_keys(version: str) -> Mapping[str, frozenset[str]]:
    """Return the keys that each class reads, by the name of the class.

    Args:
        version: The version of transformers: it has the keys of the newest recorded version up to it, or else those
            of the oldest.
    """
    recorded, asked = _recorded(), Version(version)
    return recorded[max((one for one in recorded if one <= asked), default=min(recorded))]


def newest_read_keys() -> Mapping[str, frozenset[str]]:
    """Return the keys that each class reads in the newest recorded version."""
    recorded = _recorded()
    return recorded[max(recorded)]
