"""The files that guard a repository: `mistral-lora init` plans them first, and then writes all of them or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import put_text
from pytest_mistral_lora.starter.base import ChosenBase
from pytest_mistral_lora.starter.rows import SeenRows

State = Literal["new", "same", "extended", "different"]
"""A planned file beside the one that is there: none, an equal one, one that gets lines more, another one."""

GOLDENS = Path("tests/goldens")
"""The folder of the goldens."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to write.

    Attributes:
        name: Its path in the repository, with `/`.
        text: Its whole content.
        purpose: What it is for, in a few words.
        state: Its relation to the file that is there.
    """

    name: str
    text: str
    purpose: str
    state: State


@dataclass
class StartPlan:
    """The files that guard a repository, none of which is written yet.

    Attributes:
        folder: The repository.
        base: The base model.
        rows: The data, as far as it could be read.
        files: The files, in the order in which they are written.
        notes: Sentences about choices that were made.
        to_do: Sentences about everything that is left to the user: without it, the suite is red or incomplete.
        by_hand: Lines that could not be added to a file, by the place to which they belong.
    """

    folder: Path
    base: ChosenBase
    rows: Sequence[SeenRows]
    files: list[PlannedFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)
    by_hand: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, text: str, purpose: str, *, extends: bool = False) -> None:
        """Add a file; `extends` if its text is that of the file that is there, and lines more."""
        self.files.append(PlannedFile(name, text, purpose, _state(self.folder / name, text, extends=extends)))

    @property
    def differing(self) -> list[str]:
        """Names of the files that are there with another content."""
        return [one.name for one in self.files if one.state == "different"]


def _state(path: Path, text: str, *, extends: bool) -> State:
    try:
        there = path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeError):
        return "different"
    if there is None:
        return "new"
    if there == text:
        return "same"
    return "extended" if extends else "different"


def write_plan(plan: StartPlan, *, replace: bool = False, keep: bool = False) -> None:
    """Write the files of a plan that are not there yet.

    Args:
        plan: The plan.
        replace: Whether files with other content are replaced.
        keep: Whether they stay as they are.

    Raises:
        InputError: If there are such files, and neither is set: then nothing is written. If a file cannot be written.
    """
    if plan.differing and not replace and not keep:
        first, *others = plan.differing
        found = "exists already, with other content" + (f"; so do {', '.join(others)}" if others else "")
        raise InputError(
            f"{found}; nothing was written",
            place=first,
            next_step="See the difference: --dry-run. Write only the files that are missing: --keep. Replace: --force.",
        )
    for one in plan.files:
        if one.state != "same" and not (keep and one.state == "different"):
            put_text(plan.folder / one.name, one.text)


def has_golden_rows(folder: Path) -> bool:
    """Return whether the golden folder of a repository has rows."""
    return any((folder / GOLDENS).glob("*.jsonl"))
