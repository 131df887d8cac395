"""The virtual environment of a trainer, and the Python that a trainer runs in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import InputError, RunnerError
from pytest_mistral_lora.records.files import cache_folder, write_json
from pytest_mistral_lora.records.trust import shared_by
from pytest_mistral_lora.runners.trainer import Trainer

State = Literal[
    "ready",
    "not finished",
    "made from another lock file",
    "broken: its Python is gone",
    "not there",
    "not trusted: others can write it",
]

_FINISHED = "mistral-lora.json"


@dataclass(frozen=True)
class Environment:
    """A trainer's virtual environment in the cache folder; 2 GB, or 6 GB with the libraries of a GPU.

    Attributes:
        runner: The trainer.
    """

    runner: Trainer

    @property
    def folder(self) -> Path:
        """The environment's folder, which may not exist yet."""
        return cache_folder() / "runners" / self.runner.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts" if os.name == "nt" else "bin") / "python"

    @property
    def shared(self) -> str:
        """Which folder lets other users put their code into it; empty if none does."""
        return shared_by(self.folder) or shared_by(self.python.parent)

    @property
    def state(self) -> State:
        """Whether it can be used."""
        if not self.folder.is_dir():
            return "not there"
        # before its Python is run
        if self.shared:
            return "not trusted: others can write it"
        try:
            recorded = read_json(self.folder / _FINISHED)["lock_sha256"]
        except (InputError, KeyError, TypeError):
            return "not finished"
        if recorded != sha256_file(self.runner.lock):
            return "made from another lock file"
        return "ready" if _python_version(self.python) else "broken: its Python is gone"

    def setup(self, python: Path | None = None) -> bool:
        """Make the environment, or finish it after an interrupted call; a finished environment is not changed.

        pip's output is printed as it comes.

        Args:
            python: The Python to make the environment with; an environment of another version is made again. None for
                this Python or, if that is too old for the runner, one on the `PATH`.

        Returns:
            Whether anything was done.

        Raises:
            RunnerError: If the environment cannot be made.
        """
        from filelock import FileLock

        self.require_own()
        base = self._base_python(python)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder.with_suffix(".lock")):
            made_with = _python_version(self.python)
            is_other = python is not None and made_with != _python_version(base)
            if self.state == "ready" and not is_other:
                return False
            # removed first and written last: an interrupted setup is never mistaken for a finished one
            (self.folder / _FINISHED).unlink(missing_ok=True)
            # nothing in the folder works without its Python or without pip: Debian's venv makes a folder before it
            # finds that python3-venv is missing
            if is_other or not _printed(self.python, "-I", "-m", "pip", "--version"):
                shutil.rmtree(self.folder, ignore_errors=True)
                # isolated (-I), here and below: a module in the current folder would be run in place of the library's
                self._call(base, "-I", "-m", "venv", self.folder)
            # torch first, with the libraries of its build: the lock leaves them out, because they differ by machine
            lines = self.runner.lock.read_text(encoding="utf-8").splitlines()
            for line in (line for line in lines if line.startswith("torch==")):
                self._call(self.python, "-I", "-m", "pip", "install", line)
            # --no-deps: the lock is complete; a resolver would add libraries that only training needs
            self._call(self.python, "-I", "-m", "pip", "install", "--no-deps", "--requirement", self.runner.lock)
            self._call(self.python, "-I", "-c", f"import {self.runner.module}")
            write_json(self.folder / _FINISHED, {"lock_sha256": sha256_file(self.runner.lock)})
        return True

    def require_own(self) -> None:
        """Refuse an environment whose code other users can replace.

        Raises:
            RunnerError: With the folder that they can write.
        """
        if self.shared:
            step = "Take the right from them (chmod go-w), or set MISTRAL_LORA_CACHE to a folder of yours."
            raise RunnerError(f"is not trusted: {self.shared}", place=str(self.folder), next_step=step)

    def _base_python(self, given: Path | None) -> Path:
        least = self.runner.least_python
        named = [f"python{least[0]}.{minor}" for minor in range(least[1], least[1] + 4)]
        others = [] if given else [Path(path) for path in map(shutil.which, named) if path]
        first, *_ = found = [given or Path(sys.executable), *others]
        for python in found:
            if _python_version(python) >= least:
                return python
        version = ".".join(map(str, _python_version(first)))
        raise RunnerError(
            (f"Python {version}" if version else "no Python that runs")
            + ("" if given else f", and on the PATH none of {', '.join(named)}"),
            place=str(first),
            expected=f"Python {'.'.join(map(str, least))} or newer, which {self.runner.title} asks for",
            next_step=f"Name one: mistral-lora runner setup {self.runner.name} --python PATH.",
        )

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


def interpreter(runner: Trainer, given: Path | None = None) -> Path:
    """Return the Python to run a runner with: the given one, or this one if it has the runner, or the environment's.

    Raises:
        RunnerError: If none of them has the runner.
    """
    # not by an import, and without the current folder, whose modules would be imported
    found = f"found.version({runner.distribution!r})"
    script = f"import sys; sys.path.pop(0); import importlib.metadata as found; print({found})"
    if given is not None:
        if runner.distribution and os.access(given, os.X_OK) and not _printed(given, "-c", script):
            raise RunnerError(f"{runner.title} is not installed in this Python", place=str(given))
        return given
    with suppress(PackageNotFoundError):
        if not runner.distribution or version(runner.distribution):
            return Path(sys.executable)
    environment = Environment(runner)
    environment.require_own()
    if environment.state != "ready":
        raise RunnerError(
            f"{runner.title} is not installed here, and its environment is {environment.state}",
            place=str(environment.folder),
            next_step=f"Make it: mistral-lora runner setup {runner.name}; or name a Python that has it: --python.",
        )
    return environment.python


def _python_version(python: Path) -> tuple[int, ...]:
    """Return the version of a Python, such as (3, 11); empty if the Python does not run."""
    printed = _printed(python, "-I", "-c", "import sys; print(*sys.version_info[:2])")
    return tuple(map(int, printed.split()))


def _printed(*command: str | Path) -> str:
    """Return what a command prints on standard output; empty if it fails."""
    try:
        ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return "" if ended.returncode else ended.stdout
