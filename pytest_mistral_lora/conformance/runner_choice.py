"""The names of targets, and a runner as it is named."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pytest_mistral_lora.errors import RunnerError


@dataclass(frozen=True, slots=True)
class RunnerChoice:
    """A runner as it is named: `NAME`, or `NAME=CONFIG` with the runner's own configuration file.

    Attributes:
        runner: Its name, or the path of a script.
        config: The configuration, or None for the stock one.
    """

    runner: str
    config: Path | None = None

    @classmethod
    def parse(cls, text: str, folder: Path) -> RunnerChoice:
        """Return the choice that a text names; its paths are relative to a folder.

        Raises:
            RunnerError: If there is no such runner, or no such file.
        """
        from pytest_mistral_lora.runners import RUNNERS, find_runner

        name, _, config = text.partition("=")
        runner = find_runner(name if name in RUNNERS else str(folder / name))
        path = folder / config if config else None
        if path is not None and not path.is_file():
            raise RunnerError("no such file", place=str(path), expected=f"a configuration of {runner.title}")
        return cls(name if name in RUNNERS else str(folder / name), path)

    @property
    def title(self) -> str:
        """Its part of the target's name."""
        return name_of(Path(self.runner)).removesuffix(".py")


def name_of(path: Path) -> str:
    """Return the name of a path as a part of node ids."""
    # a file of the Hub's cache is a link to one that is named by its hash
    name = path.resolve().name if path.is_dir() else path.name
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "target"


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: the name itself, or with the first free number from 2 on."""
    return next(free for free in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if free not in taken)
