"""Files by which a server makes a model: `model_files.toml` of `field`."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from pytest_mistral_lora.chat.reading import read_bounded
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.programs.registry import own_field


@dataclass(frozen=True, slots=True)
class ModelFile:
    """A file by which a server makes a model, and which the server's checks judge (`Server.model_file_cases`).

    Attributes:
        title: What it is, in words.
        lines: Regular expressions, each of which finds a line of its text.
        named: The regular expression whose first group finds the file or folder that its text names.
        name: The pattern of its name, as for `fnmatch`; empty for any name.
    """

    title: str
    lines: Sequence[str]
    named: str
    name: str = ""

    def has_lines(self, name: str, text: str) -> bool:
        """Return whether a file's name and text are those of this file."""
        is_named = not self.name or fnmatchcase(name, self.name)
        return is_named and all(re.search(line, text, re.MULTILINE) for line in self.lines)


@cache
def _model_files() -> tuple[ModelFile, ...]:
    """Return the known files; none without the folder of programs."""
    field = own_field()
    if field is None:
        return ()
    table = tomllib.loads((Path(field.__path__[0]) / "model_files.toml").read_text(encoding="utf-8"))
    return tuple(ModelFile(**entry) for entry in table["file"])


def model_file(name: str, text: str) -> str:
    """Return the title of a file by which a server makes a model; empty if it is none.

    Args:
        name: The name of the file.
        text: Its text, or the first part of it.
    """
    return next((file.title for file in _model_files() if file.has_lines(name, text)), "")


def path_in(path: Path) -> Path | None:
    """Return the file or folder that a file by which a server makes a model names, if it is here.

    Args:
        path: The file; a relative path in it starts at its folder.
    """
    try:
        text = read_bounded(path).decode("utf-8", "replace")
    except InputError:
        return None
    for file in _model_files():
        if found := re.search(file.named, text, re.MULTILINE):
            with suppress(OSError, ValueError, RuntimeError):
                named = path.parent / Path(found[1].strip('"')).expanduser()
                return named if named.exists() else None
    return None
