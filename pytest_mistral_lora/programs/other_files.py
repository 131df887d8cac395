"""Files of programs that are neither recipes, rows nor models: `other_files.toml` of `field`.

An entry of the table names a file by its keys, or by its name and its lines:

    [[file]]
    title = "a configuration of my-merger"
    keys = ["merge_method"]
    step = "It declares neither rows nor a tokenizer: name those."
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import is_folder, read_bounded
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.programs.registry import own_field


@dataclass(frozen=True, slots=True)
class OtherFile:
    """A file of a program.

    Attributes:
        title: What it is, in words.
        step: The next step, a sentence with a command; `FOLDER` in it stands for the folder that `folder` finds.
        keys: Keys that its mapping has, all of them.
        entry_key: A key that some value of its mapping has, which is a mapping itself.
        name: The pattern of its name, as for `fnmatch`; empty for any name.
        lines: Regular expressions, each of which finds a line of its text.
        folder: The regular expression whose first group finds the folder that its text names; empty if it names none.
        makes_a_model: Whether a server makes a model by it, and has checks of it (`Server.model_file_cases`).
    """

    title: str
    step: str = ""
    keys: Sequence[str] = ()
    entry_key: str = ""
    name: str = ""
    lines: Sequence[str] = ()
    folder: str = ""
    makes_a_model: bool = False

    def has_keys(self, config: Mapping[Any, Any]) -> bool:
        """Return whether a mapping has the keys of this file; False if the file is named by its text."""
        if not (self.keys or self.entry_key):
            return False
        entries = (value for value in config.values() if isinstance(value, Mapping))
        is_inside = not self.entry_key or any(self.entry_key in entry for entry in entries)
        return is_inside and all(key in config for key in self.keys)

    def has_lines(self, name: str, text: str) -> bool:
        """Return whether a file's name and text are those of this file; False if the file is named by its keys."""
        is_named = not self.name or fnmatchcase(name, self.name)
        return bool(self.lines) and is_named and all(re.search(line, text, re.MULTILINE) for line in self.lines)

    def step_for(self, text: str) -> str:
        """Return the next step for a text, with the folder that it names if this machine has it."""
        found = re.search(self.folder, text, re.MULTILINE) if self.folder else None
        is_here = found is not None and is_folder(found[1])
        return self.step.replace("FOLDER", shlex.quote(found[1])) if found and is_here else self.step


@cache
def other_files() -> tuple[OtherFile, ...]:
    """Return the known files, in their order; none without the folder of programs."""
    field = own_field()
    if field is None:
        return ()
    table = tomllib.loads((Path(field.__path__[0]) / "other_files.toml").read_text(encoding="utf-8"))
    return tuple(OtherFile(**entry) for entry in table["file"])


def configuration_of_a_program(config: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return which program's file a mapping is, and the next step; None if none is known."""
    return next(((file.title, file.step) for file in other_files() if file.has_keys(config)), None)


def text_of_a_program(name: str, text: str) -> tuple[str, str] | None:
    """Return which program's file a text is, and the next step; None if none is known.

    Args:
        name: The name of the file.
        text: Its text, or the first part of it.
    """
    files = (file for file in other_files() if not file.makes_a_model and file.has_lines(name, text))
    return next(((file.title, file.step_for(text)) for file in files), None)


def model_file(name: str, text: str) -> str:
    """Return the title of a file by which a server makes a model; empty if it is none.

    Args:
        name: The name of the file.
        text: Its text, or the first part of it.
    """
    return next((file.title for file in other_files() if file.makes_a_model and file.has_lines(name, text)), "")


def path_in(path: Path) -> Path | None:
    """Return the file or folder that a file by which a server makes a model names, if it is here.

    Args:
        path: The file; a relative path in it starts at its folder.
    """
    try:
        text = read_bounded(path).decode("utf-8", "replace")
    except InputError:
        return None
    for file in other_files():
        if file.makes_a_model and file.folder and (found := re.search(file.folder, text, re.MULTILINE)):
            with suppress(OSError, ValueError, RuntimeError):
                named = path.parent / Path(found[1].strip('"')).expanduser()
                return named if named.exists() else None
    return None
