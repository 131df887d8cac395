"""The ids and labels that other trainers would feed a model, made by their own code in their own environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from filelock import FileLock

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.errors import InputError, RunnerError, did_you_mean
from pytest_mistral_lora.records.files import cache_folder, sha256_file, write_json

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
        module: The module that it is; empty for a script of the user's own.
        distribution: The distribution of that module.
        script: The extraction script.
        config: The configuration that is used if none is given: the runner's own defaults.
        command: The command line whose code the script runs.
        lock: The versions of its environment, one a line.
    """

    name: str
    title: str
    module: str
    distribution: str
    script: Path
    config: Path
    command: str
    lock: Path


def _packaged(name: str, title: str, module: str, command: str) -> Runner:
    script = _FOLDER / "scripts" / f"{name.replace('-', '_')}_rows.py"
    config = _FOLDER / "configs" / f"{name}.yaml"
    return Runner(name, title, module, name, script, config, command, _FOLDER / "locks" / f"{name}.txt")


RUNNERS: Mapping[str, Runner] = {
    runner.name: runner
    for runner in (
        _packaged("trl", "TRL", "trl", "trl sft --config"),
        _packaged("axolotl", "Axolotl", "axolotl", "axolotl preprocess"),
        _packaged("llamafactory", "LLaMA-Factory", "llamafactory", "llamafactory-cli train"),
        _packaged("ms-swift", "ms-swift", "swift", "swift sft"),
    )
}
"""Every runner that is packaged, by name."""


@cache
def runner_fixes(name: str) -> Mapping[str, str]:
    """Return the fix of each encoded rule in a runner's own configuration; none for a script of the user's own."""
    fixes: dict[str, dict[str, str]] = tomllib.loads((_FOLDER / "fixes.toml").read_text(encoding="utf-8"))
    return fixes.get(name, {})


def find_runner(name: str) -> Runner:
    """Return a runner by its name, or by the path of a script of the user's own (`*.py`).

    Raises:
        RunnerError: If there is none.
    """
    if name in RUNNERS:
        return RUNNERS[name]
    script = Path(name)
    if script.suffix == ".py" and script.is_file():
        return Runner(script.stem, script.name, "", "", script, NOTHING, str(script), NOTHING)
    raise RunnerError(
        f"{name!r} is no runner{did_you_mean(name, RUNNERS)}",
        expected=f"one of {', '.join(RUNNERS)}, or the path of a script (*.py) that maps rows to encoded rows",
    )


State = Literal["ready", "not finished", "made from another lock file", "not there"]

_FINISHED = "mistral-lora.json"


@dataclass(frozen=True)
class Environment:
    """A runner's virtual environment in the cache folder; some 2 GB.

    Attributes:
        runner: The runner.
    """

    runner: Runner

    @property
    def folder(self) -> Path:
        """Its folder, which may not exist yet."""
        return cache_folder() / "runners" / self.runner.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    @property
    def state(self) -> State:
        """Whether it can be used."""
        if not self.folder.is_dir():
            return "not there"
        try:
            recorded = read_json(self.folder / _FINISHED)["lock_sha256"]
        except (InputError, KeyError, TypeError):
            return "not finished"
        return "ready" if recorded == sha256_file(self.runner.lock) else "made from another lock file"

    def setup(self, base_python: Path) -> bool:
        """Make it, or finish it if an earlier call was interrupted; a finished one is left as it is.

        pip's output is printed as it comes.

        Args:
            base_python: The Python that it is made with.

        Returns:
            Whether anything was done.

        Raises:
            RunnerError: If it cannot be made.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_suffix(".lock")):
            if self.state == "ready" and _runs(self.python):
                return False
            # removed first and written last: an interrupted setup is never taken for a finished one
            (self.folder / _FINISHED).unlink(missing_ok=True)
            # the Python that it was made with may be gone since, and nothing in the folder works then
            if not _runs(self.python):
                shutil.rmtree(self.folder, ignore_errors=True)
                self._call(base_python, "-m", "venv", self.folder)
            # torch first, with the libraries of its build, which the lock leaves out: they differ by machine
            lines = self.runner.lock.read_text(encoding="utf-8").splitlines()
            for line in (line for line in lines if line.startswith("torch==")):
                self._call(self.python, "-m", "pip", "install", line)
            # --no-deps: the lock is all that is wanted; a resolver would add what only training needs
            self._call(self.python, "-m", "pip", "install", "--no-deps", "--requirement", self.runner.lock)
            self._call(self.python, "-c", f"import {self.runner.module}")
            write_json(self.folder / _FINISHED, {"lock_sha256": sha256_file(self.runner.lock)})
        return True

    def _call(self, *command: str | Path) -> None:
        words = [str(word) for word in command]
        sys.stderr.write(f"$ {' '.join(words)}\n")
        try:
            code = subprocess.run(words, check=False).returncode
        except OSError as error:
            raise RunnerError(f"cannot be started: {error.strerror}", place=words[0]) from error
        if code:
            raise RunnerError(
                f"exit code {code}",
                place=" ".join(words),
                next_step=f"Read what it printed; then `mistral-lora runner setup {self.runner.name}` goes on.",
            )


def interpreter(runner: Runner) -> Path:
    """Return the Python that a runner is run with: this one if it has the runner, else its environment's.

    Raises:
        RunnerError: If it is in neither.
    """
    # not by an import: a folder of the same name in the current one can be imported, too
    with suppress(PackageNotFoundError):
        if not runner.distribution or version(runner.distribution):
            return Path(sys.executable)
    environment = Environment(runner)
    if environment.state != "ready" or not _runs(environment.python):
        raise RunnerError(
            f"{runner.title} is not installed here, and its environment is {environment.state}",
            place=str(environment.folder),
            next_step=f"Make it: mistral-lora runner setup {runner.name}; or name a Python that has it: --python.",
        )
    return environment.python


def _runs(python: Path) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False
