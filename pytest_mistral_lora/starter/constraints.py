"""The constraints file of a repository: the versions of the libraries that decide ids and verdicts.

`init` writes it, the jobs install with it (`pip install -c`), and `mistral-lora pin --upgrade` moves it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import put_text
from pytest_mistral_lora.records.goldens import ID_LIBRARIES

CONSTRAINTS = Path(".mistral-lora/constraints.txt")
"""The file in a repository."""

VERDICT_LIBRARIES = (
    *ID_LIBRARIES,
    "sentencepiece",  # the tokenizers of Mistral's versions 1 to 3
    "tiktoken",  # Tekken
    "jinja2",  # renders chat templates
    "pydantic",  # accepts or refuses a conversation in mistral-common
    "hypothesis",  # the generated rows of the laws
    "llguidance",  # the grammar of answers
    "rensa",  # nearly equal rows
    "safetensors",
    "peft",
    "accelerate",
    "torch",
)
"""The libraries whose versions can change an id or another verdict."""

_HEADER = """\
# The versions of the libraries that decide token ids and verdicts. The jobs install with them; the job of each Monday
# takes the newest releases, and so tells you what an upgrade would break. After an upgrade of your environment:
#     mistral-lora pin --upgrade
"""
_LINE = re.compile(r"^(?P<name>[A-Za-z0-9][\w.-]*)(?P<equals>\s*===?\s*)?(?P<version>[^\s;#,]*)", re.MULTILINE)


def installed_release(library: str) -> str:
    """Return the installed version of a library as an index has it; empty if it is missing or is no release.

    A local part, such as `+cpu` of torch, is left out: the version then matches each build of the release.
    """
    try:
        found = Version(version(library))
    except (PackageNotFoundError, InvalidVersion):
        return ""
    return "" if found.is_devrelease else found.public


def constraints_text(before: str = _HEADER, installed: Callable[[str], str] = installed_release) -> str:
    """Return the constraints with the installed versions; lines about other libraries stay.

    Args:
        before: The file's text. Its line of a library keeps everything but the version, such as a marker or a comment;
            a line with another operator than `==` stays.
        installed: Returns the version of a library; empty if it has none, and then its line stays.
    """
    found = {name: installed(name) for name in VERDICT_LIBRARIES}

    def moved(line: re.Match[str]) -> str:
        release = found.get(canonicalize_name(line["name"]))
        return f"{line['name']}{line['equals']}{release}" if release and line["equals"] else line[0]

    text = _LINE.sub(moved, before)
    present = {canonicalize_name(line["name"]) for line in _LINE.finditer(text)}
    missing = [f"{name}=={release}\n" for name, release in found.items() if release and name not in present]
    gap = "" if not text or text.endswith("\n") else "\n"
    return text + (gap + "".join(missing) if missing else "")


def move_constraints(path: Path) -> tuple[str, str]:
    """Move a constraints file to the installed versions, and return its text before and after.

    Raises:
        InputError: If the file is missing, or cannot be read or written.
    """
    try:
        before = path.read_bytes().decode()
    except (OSError, UnicodeError) as error:
        raise InputError(
            "no constraints file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}",
            place=str(path),
            expected="versions of libraries, as `pip install -c` reads them",
            next_step="In the root of the repository, `mistral-lora init` writes it.",
        ) from error
    after = constraints_text(before)
    if after != before:
        put_text(path, after)
    return before, after
