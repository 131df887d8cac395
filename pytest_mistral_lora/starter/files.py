"""The files that guard a repository: `mistral-lora init` plans them first, and writes all or none, and its goldens."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_mistral_lora.chat.reading import opened
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import put_text
from pytest_mistral_lora.starter.inputs import ChosenBase, SeenRows

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe.declared import Deployment

State = Literal["new", "same", "extended", "different"]
"""A planned file compared with the existing file: missing, equal, extended by our lines, or different."""

GOLDENS = Path("tests/goldens")
"""The folder of the goldens."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to write.

    Attributes:
        name: Its path in the repository, with `/`.
        text: Its whole content.
        purpose: What it is for, in a few words.
        state: Its relation to the existing file.
    """

    name: str
    text: str
    purpose: str
    state: State


@dataclass
class StartPlan:
    """The files that guard a repository, before they are written.

    Attributes:
        folder: The repository.
        base: The base model.
        rows: The data, as far as it could be read.
        files: The files, in the order in which they are written.
        notes: Sentences about the choices of the plan.
        to_do: Sentences about the user's remaining tasks; until they are done, the suite is red or incomplete.
        by_hand: Lines that could not be added to a file, by the place where they belong.
        output: The folder of the adapter in the repository.
        deployment: What production serves, as the recipe declares it; None without it.
    """

    folder: Path
    base: ChosenBase
    rows: Sequence[SeenRows]
    files: list[PlannedFile] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    to_do: list[str] = field(default_factory=list)
    by_hand: dict[str, str] = field(default_factory=dict)
    output: str = "lora-out"
    deployment: Deployment | None = None

    def add(self, name: str, text: str, purpose: str, *, extends: bool = False) -> None:
        """Add a file; set `extends` if its text is the existing file's with more lines.

        Raises:
            InputError: If a pipe or a device has the file's name.
        """
        path = self.folder / name
        state: State = "extended" if extends else "different"
        try:
            existing = _text_of(path) if path.exists() else None
        except (OSError, UnicodeError):
            state = "different"
        else:
            # Git may write text files with the line ends of Windows
            if existing is None:
                state = "new"
            elif existing.replace("\r\n", "\n") == text.replace("\r\n", "\n"):
                state = "same"
        self.files.append(PlannedFile(name, text, purpose, state))


def _text_of(path: Path) -> str:
    with opened(path) as file:
        return file.read().decode()


def write_plan(plan: StartPlan, *, replace: bool = False, keep: bool = False) -> None:
    """Write the missing files of a plan.

    Args:
        plan: The plan.
        replace: Whether to replace files with other content.
        keep: Whether to keep files with other content.

    Raises:
        InputError: If files have other content and neither flag is set; then nothing is written. If a file cannot be
            written.
    """
    differing = [file.name for file in plan.files if file.state == "different"]
    if differing and not replace and not keep:
        first, *others = differing
        found = "exists already, with other content" + (f"; so do {', '.join(others)}" if others else "")
        raise InputError(
            f"{found}; nothing was written",
            place=first,
            next_step="See the difference: --dry-run. Write only the files that are missing: --keep. Replace: --force.",
        )
    for file in plan.files:
        if file.state != "same" and not (keep and file.state == "different"):
            put_text(plan.folder / file.name, file.text)


def record_missing(folder: Path, recipe: str) -> tuple[list[str], list[str]]:
    """Record each golden row without a recording, as `pytest --mistral-golden-update` does; others stay.

    Args:
        folder: The repository.
        recipe: Name of the recipe in the repository whose tokenizer is recorded.

    Returns:
        The names of the files that were written, and a sentence for each row that could not be recorded.
    """
    from pytest_mistral_lora.conformance.checks import Settings
    from pytest_mistral_lora.conformance.collection import NamedPaths
    from pytest_mistral_lora.conformance.user_goldens import rendering_checks, user_cases

    if os.environ.get("CI"):
        return [], ["Record the goldens outside of CI (CI is set here): a golden that CI writes guards nothing."]
    goldens = folder / GOLDENS
    [target] = NamedPaths(recipes=[folder / recipe]).targets()
    missing = {case.check: case for case in user_cases([goldens], "templates", target) if not case.path.exists()}
    written, faults = [], []
    with tempfile.TemporaryDirectory() as work:
        settings = Settings(1, None, "cpu", True, (goldens,), True, Path(work))
        for check in rendering_checks(target, settings):
            if check.case not in missing:
                continue
            result = check.run()
            for finding in result.findings:
                found = f"{finding.place}: {finding.found}" if finding.place else finding.found
                step = f". {finding.detail}" if finding.detail and "\n" not in finding.detail else ""
                faults.append(
                    f"Mend a golden row: {found}{f'; expected {finding.expected}' * bool(finding.expected)}{step}"
                )
            faults += [result.not_checked] if result.not_checked else []
            if not result.findings and not result.not_checked:
                written.append(missing[check.case].path.relative_to(folder).as_posix())
    return written, list(dict.fromkeys(faults))
