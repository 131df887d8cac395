"""The ids and labels that other trainers and harnesses feed a model, made by their own code and environments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hashes import sha256_file
from pytest_mistral_lora.errors import InputError, RunnerError, did_you_mean
from pytest_mistral_lora.field.registry import TRAINERS_GROUP, Registry
from pytest_mistral_lora.records.files import cache_folder, write_json
from pytest_mistral_lora.records.trust import shared_by
from pytest_mistral_lora.runners.tasks import PreferenceTasks

TIME_LIMIT = 900.0
"""Default of the seconds that a runner may take for all rows."""

NOTHING = Path(os.devnull)
"""The configuration of a script that gets none from the user."""

_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Runner:
    """Another trainer or a harness, and the script that takes what it feeds a model out of it.

    Attributes:
        name: Its name on the command line; for a user's script, the file's name.
        title: Its name in texts.
        module: Its module; empty for a user's script.
        distribution: The distribution of that module.
        script: The extraction script.
        config: The default configuration: the runner's own defaults.
        command: The command line whose code the script runs.
        lock: The versions of its environment, one a line.
        least_python: The oldest Python that these versions support.
        is_evaluation: Whether it trains nothing: it feeds a model the prompts of its own tasks, and takes no rows.
        tasks: Its commands that take preference pairs, and those that take rated answers.
    """

    name: str
    title: str
    module: str
    distribution: str
    script: Path
    config: Path
    command: str
    lock: Path
    least_python: tuple[int, int] = (3, 11)
    is_evaluation: bool = False
    tasks: PreferenceTasks = field(default_factory=PreferenceTasks)

    def default_config(self, task: str) -> Path:
        """Return the configuration of a run for which the user gives none.

        Args:
            task: One of `tasks`; empty for chat rows.
        """
        name = self.tasks.configs.get(task)
        return self.config.parent / "preferences" / f"{name}.yaml" if name else self.config


def _packaged(name: str, title: str, module: str, command: str, **options: Any) -> Runner:
    script = _FOLDER / "scripts" / f"{name.replace('-', '_')}_rows.py"
    config = _FOLDER / "configs" / f"{name}.yaml"
    return Runner(name, title, module, name, script, config, command, _FOLDER / "locks" / f"{name}.txt", **options)


_OURS: Mapping[str, Runner] = {
    runner.name: runner
    for runner in (
        _packaged("trl", "TRL", "trl", "trl sft --config", tasks=PreferenceTasks(("dpo", "reward", "kto"), ("kto",))),
        _packaged(
            "axolotl",
            "Axolotl",
            "axolotl",
            "axolotl preprocess",
            least_python=(3, 12),
            tasks=PreferenceTasks(
                pairs=("dpo", "ipo", "simpo", "orpo"),
                rated=("kto",),
                key="rl",
                configs={
                    "dpo": "axolotl-dpo",
                    "ipo": "axolotl-dpo",
                    "simpo": "axolotl-dpo",
                    "orpo": "axolotl-orpo",
                    "kto": "axolotl-kto",
                },
            ),
        ),
        _packaged(
            "llamafactory",
            "LLaMA-Factory",
            "llamafactory",
            "llamafactory-cli train",
            tasks=PreferenceTasks(
                pairs=("dpo", "rm"),
                rated=("kto",),
                key="stage",
                configs={"dpo": "llamafactory-pairs", "rm": "llamafactory-pairs", "kto": "llamafactory-rated"},
            ),
        ),
        _packaged(
            "ms-swift",
            "ms-swift",
            "swift",
            "swift sft",
            tasks=PreferenceTasks(
                pairs=("dpo", "rm", "cpo", "simpo", "orpo"),
                rated=("kto",),
                key="rlhf_type",
                configs={"kto": "ms-swift-kto"},
            ),
        ),
        _packaged("lm-eval", "lm-evaluation-harness", "lm_eval", "lm_eval run --config", is_evaluation=True),
    )
}
"""The runners of this package, by name."""

RUNNERS = Registry(TRAINERS_GROUP, "trainer", Runner, _OURS)
"""The runners, by name."""


@cache
def runner_fixes(name: str) -> Mapping[str, str]:
    """Return the fix of each encoded rule in a runner's own configuration; empty for a user's script.

    Args:
        name: The runner's name; with `-preferences` behind it, for its trainers of preferences.
    """
    fixes: dict[str, dict[str, str]] = tomllib.loads((_FOLDER / "fixes.toml").read_text(encoding="utf-8"))
    return {rule: fix for rules, fix in fixes.get(name, {}).items() for rule in rules.split()}


def find_runner(name: str) -> Runner:
    """Return a runner by its name, or by the path of a user's script (`*.py`).

    Raises:
        RunnerError: If there is no such runner.
        InputError: If two packages have a runner of this name.
        EntryPointError: If it is of another package, and does not load.
    """
    if name in RUNNERS:
        return RUNNERS[name]
    script = Path(name)
    if script.suffix == ".py" and script.is_file():
        return Runner(script.stem, script.name, "", "", script, NOTHING, str(script), NOTHING)
    raise RunnerError(
        f"{name!r} is not a runner{did_you_mean(name, RUNNERS)}",
        expected=f"one of {', '.join(RUNNERS)}, or the path of a script (*.py) that maps rows to encoded rows",
    )


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
    """A runner's virtual environment in the cache folder; 2 GB, or 6 GB with the libraries of a GPU.

    Attributes:
        runner: The runner.
    """

    runner: Runner

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


def interpreter(runner: Runner, given: Path | None = None) -> Path:
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
