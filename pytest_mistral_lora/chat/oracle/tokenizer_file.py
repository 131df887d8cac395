"""The Mistral tokenizer file at a path."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

TEKKEN = "tekken.json"


@cache
def shipped_files() -> Path:
    """Return the folder of the tokenizer files that mistral-common ships. They are trusted like its code."""
    # without importing it: the files of a folder are read where no oracle is needed, too
    package = find_spec("mistral_common")
    return Path((package and package.origin) or "mistral_common").parent / "data"


def oracle_file(path: Path) -> Path | None:
    """Return the Mistral tokenizer file at a path: the file itself, or the one in a checkpoint folder.

    A folder holds `tekken.json` or one `tokenizer.model.vN` (the newest version, if there are several). None if
    both are missing: `tokenizer.model` alone does not give its version.
    """
    if path.is_file():
        return path
    if (path / TEKKEN).is_file():
        return path / TEKKEN
    versioned = [file for file in path.glob("*.model.v*") if file.is_file()]
    return max(versioned, key=_version, default=None)


def _version(file: Path) -> tuple[int, int]:
    """Order `….model.v7m1` after `….model.v7` after `….model.v3`."""
    number, _, image = file.suffix.removeprefix(".v").partition("m")
    return (int(number) if number.isdigit() else -1, int(image) if image.isdigit() else 0)
