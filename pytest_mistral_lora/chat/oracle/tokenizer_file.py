"""The Mistral tokenizer file at a path."""

from __future__ import annotations

from pathlib import Path

TEKKEN = "tekken.json"


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
