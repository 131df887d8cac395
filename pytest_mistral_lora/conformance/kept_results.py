"""Results of earlier runs of `check`: what has not changed is not judged again; in doubt, it is."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from datetime import date
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes, sha256_file
from pytest_mistral_lora.checkpoint.hub_cache import listing_note, snapshot_of
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.targets import DatasetTarget, RecipeTarget, Target, given_path
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.records.goldens import goldens_folder
from pytest_mistral_lora.records.secrets import is_secret_name
from pytest_mistral_lora.records.trust import shared_by

_SUBJECTS = ("recipe", "tokenizer", "template", "mask", "dataset")  # no weights are read; kept if none has an error
_LARGE = 16 << 20  # bytes beyond which the state of a file stands for its content
_SETTLED = 2.0  # seconds before a run in which nothing may have changed: a file system may write times so roughly
_LIBRARIES = ("mistral_common", "transformers", "tokenizers", "jinja2", "sentencepiece", "tiktoken", "huggingface_hub")
# variables of terminal, session and caller
_IGNORED = re.compile(
    r"_|OLDPWD|PWD|SHLVL|TERM\w*|COLUMNS|LINES|PS\d|WINDOWID|XDG_SES\w*|SSH_\w*|TMUX\w*|GIT_\w*|PRE_C\w*"
)
_STOPPED = re.compile(r" failed \(ML\d{3}\)$|\b(ended|memory|time|seconds?)\b")  # by another check, or the machine


class KeptResults:
    """The results in a folder: `found` counts those of this run, `distrust` says why the folder is not used."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found, self.distrust = folder, 0, shared_by(folder)
        self.outputs: dict[str, Path] = {}  # of the recipes whose results were found, by the name of the target
        self._settled = time.time() - _SETTLED
        self._entries: dict[str, tuple[Path, dict[str, Any], list[Any], int]] = {}

    def checks_of(
        self, subject: str, target: Target, settings: Settings, make: Callable[[], Iterable[Check]]
    ) -> Iterator[Check]:
        """Yield the checks of a subject: with the results of an earlier run, or those that `make` makes."""
        if self.distrust or subject not in _SUBJECTS:
            yield from make()
            return
        named = [subject, str(Path.cwd()), repr(target), repr(settings), repr(getattr(target, "content", None))]
        file, kept = self.folder / f"{_hash(named[:3])[:32]}.json", list[CheckOutcome]()
        with suppress(Exception):
            entry = read_json(file)
            if entry["key"] == _hash([named, self._surroundings]) and entry["state"] == _state(entry["state"]):
                kept = [*map(CheckOutcome.from_json, entry["checks"])]
                self.outputs |= {target.name: Path(entry["output"])} if entry["output"] else {}
        for check in kept:
            self.found += 1
            judge = partial(Result, check.findings, check.not_checked, tuple(check.facts.items()))
            yield Check(target, check.subject, check.case, judge, is_kept=True)
        if kept:
            return
        checks = [*make()]
        with suppress(Exception):
            output = str(target.recipe.output) if isinstance(target, RecipeTarget) else ""
            entry = {"key": _hash([named, self._surroundings]), "output": output}
            entry["state"] = _state(map(str, _paths(subject, target)))
            self._entries |= dict.fromkeys((check.name for check in checks), (file, entry, [], len(checks)))
        yield from checks

    def take(self, check: Check, result: Result) -> None:
        """Take the result of a check; with the last one of its subject, write the entry."""
        file, entry, outcomes, number = self._entries.get(check.name, (self.folder, {}, [], -1))
        if all(found.severity != "error" for found in result.findings) and not _STOPPED.search(result.not_checked):
            parts = (result.findings, (), result.not_checked, dict(result.facts))
            outcomes.append(CheckOutcome("", check.subject, check.case, "passed", *parts).to_json())
        with suppress(Exception):
            if len(outcomes) == number and entry["state"] == _state(entry["state"], self._settled):
                self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_text(file, json.dumps({**entry, "checks": outcomes}))

    @cached_property
    def _surroundings(self) -> list[Any]:
        """What a result depends on beside options and files: code, packages, devices, date and variables."""
        devices = sorted(str(path) for path in [*Path("/dev").glob("nvidia*"), *Path("/dev").glob("kfd")])
        # a secret opens a door; nothing is made of it
        values = {name: is_secret_name(name) or value for name, value in os.environ.items()}
        variables = {name: value for name, value in values.items() if not _IGNORED.fullmatch(name)}
        return [states_of_code(), sys.version, sys.path, devices, date.today().isoformat(), variables]


def states_of_code() -> dict[str, list[int]]:
    """Return size and time of each file of code that a result depends on: this package, its libraries, its plugins."""
    code = [Path(__file__).parents[1], goldens_folder()]
    code += [Path(spec.origin).parent for name in _LIBRARIES if (spec := find_spec(name)) and spec.origin]
    files = [f"{parent}/{name}" for folder in code for parent, _, names in os.walk(folder) for name in names]
    files += [str(info) for folder in sys.path for info in Path(folder).glob("*.*-info")]
    states = ((file, os.lstat(file)) for file in files if "__pycache__" not in file)
    return {file: [status.st_size, status.st_mtime_ns] for file, status in states}


def _paths(subject: str, target: Target) -> Iterator[Path]:
    """Yield the files and folders that a subject reads, as its checks find them; LookupError if it may read others."""
    from pytest_mistral_lora.training.run_folder import work_folder

    judge = target.judge if isinstance(target, DatasetTarget) else target
    if type(judge) not in (Target, RecipeTarget) or judge.loaded is not None:
        raise LookupError
    if judge.path is not None:  # else a file of mistral-common
        folder, oracle = judge.tokenizer.path, judge.tokenizer.declared
        yield from (given_path(judge.path), folder, Path(oracle or folder))
        yield from [listing_note(folder)] if snapshot_of(folder) else []
    if isinstance(target, RecipeTarget | DatasetTarget) and subject in ("recipe", "dataset"):
        recipe = target.recipe if isinstance(target, RecipeTarget) else None
        files = {file.path for file in target.files}
        rows = [given_path(target.path)] if recipe is None else [*recipe.data_paths]
        paths = [*rows] if recipe is None else [work_folder(recipe)]
        json.dumps(recipe and recipe.model_dump(), default=paths.append)  # each path of a recipe: no plain JSON data
        yield from paths
        # what another trainer declares, a logger and an adapter to start from read files elsewhere
        is_declared = any(not path.is_dir() and path not in files for path in rows)
        is_elsewhere = any(not any(file.is_relative_to(path) for path in rows) for file in files)
        if is_declared or is_elsewhere or (recipe and (recipe.training.report_to or recipe.lora.start)):
            raise LookupError


def _state(paths: Iterable[str], settled: float = sys.maxsize) -> dict[str, str]:
    return {path: _digest(Path(path), settled) for path in paths}


def _digest(path: Path, settled: float = sys.maxsize) -> str:
    """Return what a path holds; LookupError if that cannot be told, or if anything has changed after `settled`."""
    if not os.path.lexists(path):
        existing = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        return f"missing below {os.path.realpath(existing)} {existing.stat().st_mode}"
    status, entries = path.stat(), sorted(path.iterdir()) if path.is_dir() else []
    leads_out = any(entry.is_symlink() and entry.is_dir() for entry in entries)
    if leads_out or status.st_ctime > settled or not (path.is_dir() or path.is_file()):
        raise LookupError
    if path.is_dir():
        return _hash([os.path.realpath(path), [[entry.name, _digest(entry, settled)] for entry in entries]])
    state = f"{status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
    return f"{os.path.realpath(path)} {state if status.st_size > _LARGE else sha256_file(path)}"


def _hash(data: Any) -> str:
    return sha256_bytes(json.dumps(data, sort_keys=True).encode())
