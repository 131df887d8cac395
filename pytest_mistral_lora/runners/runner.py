"""The runners that can be asked: one table, from which commands, help and documentation are made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_mistral_lora.errors import RunnerError

TIME_LIMIT = 900.0
"""Seconds that a runner may take for all rows, where nothing else is said."""

NOTHING = Path(os.devnull)
"""The configuration of a script that is given none."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Runner:
    """Another trainer, and the script that takes ids and labels out of it.

    Attributes:
        name: Its name on the command line; for a script of the user's own, the file's.
        title: Its name in texts.
        module: Module and distribution that it is; empty for a script of the user's own.
        script: The extraction script.
        config: The configuration that is used where none is given: the runner's own defaults.
        command: The command line whose code the script runs.
        lock: The versions of its environment, one a line.
    """

    name: str
    title: str
    module: str
    script: Path
    config: Path
    command: str
    lock: Path


def _packaged(name: str, title: str, module: str, command: str) -> Runner:
    script = _FOLDER / "scripts" / f"{name}_rows.py"
    config = _FOLDER / "configs" / f"{name}.yaml"
    return Runner(name, title, module, script, config, command, _FOLDER / "locks" / f"{name}.txt")


RUNNERS: Mapping[str, Runner] = {
    runner.name: runner
    for runner in (
        _packaged("trl", "TRL", "trl", "trl sft --config"),
        _packaged("axolotl", "Axolotl", "axolotl", "axolotl preprocess"),
        _packaged("llamafactory", "LLaMA-Factory", "llamafactory", "llamafactory-cli train"),
    )
}
"""Every runner that is packaged, by name."""


def find_runner(name: str) -> Runner:
    """Return a runner by its name, or by the path of a script of the user's own (`*.py`).

    Raises:
        RunnerError: If there is none.
    """
    if name in RUNNERS:
        return RUNNERS[name]
    script = Path(name)
    if script.suffix == ".py" and script.is_file():
        return Runner(script.stem, script.name, "", script, NOTHING, str(script), NOTHING)
    raise RunnerError(
        f"{name!r} is no runner",
        expected=f"one of {', '.join(RUNNERS)}, or the path of a script (*.py) that maps rows to encoded rows",
    )
