"""The results of earlier runs: checks are not run again if nothing that they read has changed.

The checks of a subject are kept together. They are found again if this package, the installed packages, Python, the
options, the variables of the environment, the devices and the date are the same, and if every file that the subject
reads has the same content. `INPUTS` declares these files, and nothing else does: a subject without an entry there is
judged in each run. So are checks that found an error.
"""

from __future__ import annotations

import json
import os
import platform
import re
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes, sha256_file
from pytest_mistral_lora.checkpoint.hub_cache import listing_note, snapshot_of
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.targets import DatasetTarget, JudgedTarget, RecipeTarget, Target, given_path
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.files import cache_folder, write_text
from pytest_mistral_lora.records.goldens import goldens_folder

FORMAT = 1
"""Number of the form of an entry."""

_LARGE = 64 * 1024 * 1024
"""Bytes of a file from which its state is compared in place of its content: hashing weights would take minutes."""
_UNSETTLED = 2.0
"""Seconds after a change in which another change may leave the same state, by the resolution of file systems."""
_DAYS = 30
"""Days after which an entry that no run has written again is removed."""

_VARIABLES = (
    "ACCELERATE_", "CUDA_", "DEEPSPEED_", "FSDP_", "HF_", "HIP_", "HOME", "HUGGING", "LOCAL_RANK", "MISTRAL_", "OMP_",
    "PYTHON", "PYTORCH_", "RANK", "ROCR_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "TZ", "WORLD_SIZE", "XDG_",
)  # fmt: skip
"""The beginnings of the names of variables that checks, or the libraries that they call, depend on."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files that the checks of a subject read.

    Attributes:
        content: Files and folders whose content is read; a folder stands for everything in it.
        places: Paths of which only the kind and the destination matter, such as an output.
    """

    content: tuple[Path, ...] = ()
    places: tuple[Path, ...] = ()


class _UnknownInputsError(Exception):
    """It is not known what a check reads."""


def _of_tokenizer(target: Target) -> Inputs:
    """Return the folder or file of a tokenizer, and the files of a declared oracle and of the recipe."""
    recipe = (given_path(target.path),) if isinstance(target, RecipeTarget) else ()
    if target.path is None:
        return Inputs()  # a shipped tokenizer is a file of mistral-common
    tokenizer = target.tokenizer
    declared = Path(tokenizer.declared or "")
    oracle = (declared,) if tokenizer.declared and declared.exists() else ()
    note = (listing_note(tokenizer.path),) if snapshot_of(tokenizer.path) else ()
    return Inputs((*recipe, tokenizer.path, *oracle, *note))


def _of_rows(target: Target) -> Inputs:
    """Return the data files of a recipe or of rows alone, and what their tokenizer reads."""
    judge: Target
    named: tuple[Path, ...]
    if isinstance(target, RecipeTarget):
        judge, named, files = target, target.recipe.data.paths, target.files
    elif isinstance(target, DatasetTarget):
        judge, named, files = target.judge, (given_path(target.path),), target.files
    else:
        raise _UnknownInputsError
    read = {file.path for file in files}
    for path in named:
        # the declaration of another trainer, which names files elsewhere
        if path not in read and not path.is_dir():
            raise _UnknownInputsError
    if not all(path in named or any(path.is_relative_to(folder) for folder in named) for path in read):
        raise _UnknownInputsError
    return Inputs((*named, *_of_tokenizer(judge).content))


def _of_recipe(target: Target) -> Inputs:
    """Return the recipe, its base and its schemas, and the places of its output and its data."""
    from pytest_mistral_lora.training.recipe.settings import JsonSchemaCheck
    from pytest_mistral_lora.training.run_folder import work_folder

    # a logger has settings of its own
    if not isinstance(target, RecipeTarget) or target.recipe.training.report_to:
        raise _UnknownInputsError
    recipe = target.recipe
    schemas = [check.json_schema for check in recipe.evaluation.checks if isinstance(check, JsonSchemaCheck)]
    content = (*_of_tokenizer(target).content, *schemas)
    return Inputs(content, (recipe.output, work_folder(recipe), *recipe.data.paths))


INPUTS: Mapping[str, Callable[[Target], Inputs]] = {
    "recipe": _of_recipe,
    "tokenizer": _of_tokenizer,
    "template": _of_tokenizer,
    "mask": _of_tokenizer,
    "dataset": _of_rows,
}
"""What the checks of a subject read, by the subject's name in `collection`. Without an entry, nothing is kept."""


def default_folder() -> Path | None:
    """Return the folder of results; None in CI, where it would have to be named."""
    # without a home folder, as in some containers, nothing is kept
    with suppress(InputError):
        return None if os.environ.get("CI") else cache_folder() / "results"
    return None


@dataclass
class _Entry:
    """The results of one subject of a target, while its checks run."""

    file: Path
    inputs: Inputs
    before: Mapping[str, str]
    expected: list[Check]
    results: dict[str, Result] = field(default_factory=dict)


class KeptResults:
    """A folder with the results of earlier runs.

    Attributes:
        folder: The folder; it is made when something is written.
        found: The number of checks whose results were found.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            InputError: If a file has its name.
        """
        with suppress(OSError):  # it may not be looked into, and then nothing is found or kept
            if folder.exists() and not folder.is_dir():
                raise InputError("is not a folder", place=str(folder), expected="a folder for results, new or old")
        self.folder: Path = folder
        self.found: int = 0
        self._entries: dict[str, _Entry] = {}
        self._digests: dict[Path, str] = {}
        self._outputs: dict[str, Path] = {}

    def checks_of(
        self, subject: str, target: Target, settings: Settings, make: Callable[[], Iterable[Check]]
    ) -> Iterator[Check]:
        """Yield the checks of a subject: with the results of an earlier run, or the real ones.

        Args:
            subject: The name of the subject in `collection`.
            target: The target.
            settings: The settings of the run.
            make: Makes the real checks.
        """
        if subject not in INPUTS or settings.golden_folders or settings.update or settings.seed is not None:
            yield from make()
            return
        file = self.folder / f"{_hash([str(Path.cwd()), subject, _identity(target)])[:32]}.json"
        kept = self._read(file, self._key(settings))
        if kept is not None:
            if subject == "recipe":
                self._outputs[target.name] = Path(kept["places"][0])
            for check in _checks_from(kept["checks"], target):
                self.found += 1
                yield check
            return
        checks = [*make()]
        # an error here is a finding of the checks, and then nothing is kept
        with suppress(_UnknownInputsError, MistralLoraError, OSError):
            inputs = INPUTS[subject](target)
            entry = _Entry(file, inputs, _state(inputs, self._digest), checks)
            self._entries.update(dict.fromkeys((check.name for check in checks), entry))
        yield from checks

    def output_of(self, target: RecipeTarget) -> Path | None:
        """Return the output folder of a recipe whose results were found; None for another recipe."""
        return self._outputs.get(target.name)

    def take(self, check: Check, result: Result, settings: Settings) -> None:
        """Take the result of a check; with the last one of its subject, write the entry."""
        entry = self._entries.get(check.name)
        if entry is None:
            return
        entry.results[check.name] = result
        if len(entry.results) < len(entry.expected) or not all(map(_can_be_kept, entry.results.values())):
            return
        # a file that has changed while its checks ran: they may have seen either content
        with suppress(_UnknownInputsError, MistralLoraError, OSError):
            if _state(entry.inputs, _digest) == entry.before:
                self._write(entry, self._key(settings))

    def _digest(self, path: Path) -> str:
        # the subjects of a recipe read the same base
        if path not in self._digests:
            self._digests[path] = _digest(path)
        return self._digests[path]

    def _key(self, settings: Settings) -> str:
        chosen = {name: value for name, value in asdict(settings).items() if name != "work_folder"}
        return _hash([self._surroundings, chosen])

    @cached_property
    def _surroundings(self) -> list[Any]:
        """Everything beside options and files that a result can depend on, as plain JSON data."""
        variables = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(_VARIABLES) and "TOKEN" not in name.removeprefix("TOKENIZERS_")
        }
        devices = [str(path) for path in sorted([*Path("/dev").glob("nvidia*"), *Path("/dev").glob("kfd")])]
        system = [sys.version, platform.machine(), devices, date.today().isoformat()]
        return [FORMAT, _own_code(), _installed_packages(), system, variables]

    def _read(self, file: Path, key: str) -> Mapping[str, Any] | None:
        """Return an entry whose inputs are unchanged; None without one."""
        try:
            kept = read_json(file)
            if kept["sha256"] != _hash(kept["content"]) or kept["content"]["key"] != key:
                return None
            content: Mapping[str, Any] = kept["content"]
            inputs = Inputs(*(tuple(map(Path, content[name])) for name in ("content", "places")))
            return content if _state(inputs, self._digest) == content["state"] else None
        # a damaged file can hold any value
        except (_UnknownInputsError, MistralLoraError, OSError, KeyError, TypeError, ValueError):
            return None

    def _write(self, entry: _Entry, key: str) -> None:
        content = {
            "key": key,
            "content": [str(path) for path in entry.inputs.content],
            "places": [str(path) for path in entry.inputs.places],
            "state": dict(entry.before),
            "checks": [
                {
                    "subject": check.subject,
                    "case": check.case,
                    "findings": [finding.to_json() for finding in entry.results[check.name].findings],
                    "not_checked": entry.results[check.name].not_checked,
                    "facts": dict(entry.results[check.name].facts),
                }
                for check in entry.expected
            ],
        }
        # as it is read again: JSON has no tuples
        content = json.loads(json.dumps(content))
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(entry.file, json.dumps({"content": content, "sha256": _hash(content)}))
        for old in self.folder.glob("*.json"):
            with suppress(OSError):  # another process may have removed it
                if time.time() - old.stat().st_mtime > _DAYS * 86_400:
                    old.unlink()


def _hash(data: Any) -> str:
    # in ASCII: the name of a file may have bytes that are not UTF-8
    return sha256_bytes(json.dumps(data, sort_keys=True).encode())


def _can_be_kept(result: Result) -> bool:
    # a check that another one stopped says nothing about its own inputs
    is_stopped = re.search(r" failed \(ML\d{3}\)$", result.not_checked)
    return not is_stopped and all(finding.severity != "error" for finding in result.findings)


def _checks_from(kept: Sequence[Mapping[str, Any]], target: Target) -> Iterator[Check]:
    for data in kept:
        findings = tuple(map(Finding.from_json, data["findings"]))
        result = Result(findings, data["not_checked"], tuple(data["facts"].items()))
        yield Check(target, data["subject"], data["case"], partial(_as_kept, result), is_kept=True)


def _as_kept(result: Result) -> Result:
    return result


def _identity(target: Target) -> list[Any]:
    """Return how a run names a target, as plain JSON data."""
    judge = _identity(target.judge) if isinstance(target, JudgedTarget) else None
    return [type(target).__name__, target.name, str(target.path), target.oracle_name, target.trains, judge]


def _state(inputs: Inputs, digest: Callable[[Path], str]) -> dict[str, str]:
    """Return the state of all inputs, by path.

    Raises:
        _UnknownInputsError: If the content of a path cannot be told.
        OSError: If a file cannot be read.
        InputError: If a file cannot be read.
    """
    return {
        **{f"content {path}": digest(path) for path in inputs.content},
        **{f"place {path}": _kind(path) for path in inputs.places},
    }


def _kind(path: Path) -> str:
    """Return the destination of a path, and whether a file or a folder is there."""
    real = os.path.realpath(path)
    existing = next(name for name in (real, *map(str, Path(real).parents)) if os.path.lexists(name))
    return f"{real} {existing} {stat.S_IFMT(Path(existing).lstat().st_mode)}"


def _digest(path: Path) -> str:
    """Return a hash of the content of a file or a folder, or that it is missing.

    Raises:
        _UnknownInputsError: If a folder below has a link to a folder, or anything but files, or a file has just
            changed.
        OSError: If a file cannot be read.
        InputError: If a file cannot be read.
    """
    if not os.path.lexists(path):
        return "missing"
    if not path.is_dir():
        return _file_digest(path)
    parts = [
        [os.path.relpath(entry, path), "folder" if entry.is_dir() else _file_digest(Path(entry))]
        for entry in _entries_below(path)
    ]
    return _hash([os.path.realpath(path), parts])


def _entries_below(folder: Path | str) -> Iterator[os.DirEntry[str]]:
    """Yield the files and folders of a folder and of those below, in order.

    Raises:
        _UnknownInputsError: If there is a link to a folder.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and entry.is_symlink():
            raise _UnknownInputsError
        yield entry
        if entry.is_dir():
            yield from _entries_below(entry.path)


def _file_digest(file: Path) -> str:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise _UnknownInputsError
    link = os.path.realpath(file) if file.is_symlink() else ""
    if status.st_size <= _LARGE:
        return f"{sha256_file(file)} {link}"
    if time.time() - status.st_ctime < _UNSETTLED:
        raise _UnknownInputsError
    # the time of the last change of the inode cannot be set, unlike that of the content
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {link}"


def _own_code() -> str:
    """Return the state of this package's files: two of its commits can have the same version."""
    states = []
    for folder in (Path(__file__).parents[1], goldens_folder()):
        for entry in _entries_below(folder):
            if not entry.is_dir() and not entry.name.endswith(".pyc"):
                states.append([entry.path, entry.stat().st_size, entry.stat().st_mtime_ns])
    return _hash(states)


def _installed_packages() -> list[list[Any]]:
    """Return name and version of each installed package, and when it was installed: the folders of their metadata."""
    found = []
    for folder in dict.fromkeys(sys.path):
        with suppress(OSError):
            for entry in os.scandir(folder or "."):
                if entry.name.endswith((".dist-info", ".egg-info")):
                    found.append([entry.name, entry.stat().st_mtime_ns])
    return sorted(found)
