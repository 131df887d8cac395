"""The results of earlier runs: checks are not run again if nothing that they read has changed.

The checks of a subject are kept together. They are found again if this package, the installed packages, the files of
the libraries that make ids, Python, the options, the variables of the environment, the devices and the date are the
same, and if every file that the subject reads has the same content. For an adapter or a model, so must be the files of
the libraries that compute with it, the processor and the driver. `INPUTS` declares the files that are read, and nothing
else does: a subject without an entry there is judged in each run. So are checks that found an error.

An entry has a seal by a key of the user. A folder that other users can write is neither read nor written.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import date
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from pytest_mistral_lora.chat.diff import ShownToken
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.token_rows import TokenRow
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes, sha256_file
from pytest_mistral_lora.checkpoint.hub_cache import listing_note, snapshot_of
from pytest_mistral_lora.checkpoint.tokenizer_folder import MODEL_CONFIG
from pytest_mistral_lora.conformance.checks import Check, Settings, Subject
from pytest_mistral_lora.conformance.finding import Finding, Result
from pytest_mistral_lora.conformance.model_targets import AdapterTarget
from pytest_mistral_lora.conformance.targets import DatasetTarget, JudgedTarget, RecipeTarget, Target, given_path
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.files import cache_folder, write_text
from pytest_mistral_lora.records.git import ask_git, is_in_repository
from pytest_mistral_lora.records.goldens import goldens_folder
from pytest_mistral_lora.records.secrets import is_secret_name
from pytest_mistral_lora.records.trust import is_sealed, seal, shared_by, user_key

FORMAT = 3
"""Number of the form of an entry."""

_LARGE = 64 * 1024 * 1024
"""Bytes of a file from which its state is compared in place of its content: hashing weights would take minutes."""
_UNSETTLED = 2.0
"""Seconds after a change in which another change may leave the same state, by the resolution of file systems."""
_DAYS = 30
"""Days after which an entry that no run has written again is removed."""

_LIBRARIES = (
    "mistral_common", "transformers", "tokenizers", "jinja2", "sentencepiece", "tiktoken", "huggingface_hub"
)  # fmt: skip
"""The packages whose code makes ids, templates and paths of the Hub: a change of their files changes results."""

_LIBRARIES_OF_WEIGHTS = ("torch", "peft", "safetensors", "accelerate", "bitsandbytes", "numpy")
"""The packages whose code loads an adapter and computes with it."""
_OF_WEIGHTS = ("adapter", "merged", "manifest", "transcript")
"""The subjects that load an adapter or a model."""

# of the terminal, the session and the caller; each new window has other values
_IGNORED = re.compile(
    r"_|OLDPWD|PWD|SHLVL|SHELL|TERM|COLORTERM|COLUMNS|LINES|PS\d|PROMPT.*|LS_COLORS|LESS.*|PAGER|EDITOR|VISUAL|MAIL"
    r"|HIST.*|BASH.*|ZSH.*|FISH.*|(FORCE|NO|CLI)_?COLOR|DISPLAY|WAYLAND_DISPLAY|WINDOW(ID)?|XAUTHORITY|STY|INVOCATION_ID"
    r"|JOURNAL_STREAM|MANAGERPID|SYSTEMD_.*|DBUS_.*|XDG_(SESSION|SEAT|VTNR|RUNTIME|CURRENT|ACTIVATION)\w*|SSH_.*|TMUX.*"
    r"|GPG_.*|VSCODE_.*|TERM_.*|ITERM_.*|LC_TERMINAL.*|KITTY_.*|WEZTERM_.*|ALACRITTY_.*|GHOSTTY_.*|VTE_.*|GNOME_.*"
    r"|KONSOLE_.*|WT_.*|STARSHIP_.*|DIRENV_.*|VIRTUAL_ENV_PROMPT|CONDA_PROMPT_MODIFIER|PRE_COMMIT.*|GIT_.*|PYTEST_.*"
    r"|GITHUB_(STEP_SUMMARY|OUTPUT|ENV|PATH|STATE)"
)
"""The names of variables that no check depends on. Any other may be read by a check or by a library that it calls."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files that the checks of a subject read.

    Attributes:
        content: Files and folders whose content is read; a folder stands for everything in it.
        places: Paths of which only the kind and the destination matter, such as an output.
        times: Files whose last change is compared with that of another file.
        histories: Folders whose history in Git is read.
    """

    content: tuple[Path, ...] = ()
    places: tuple[Path, ...] = ()
    times: tuple[Path, ...] = ()
    histories: tuple[Path, ...] = ()


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
        judge, named, files = target, target.recipe.data_paths, target.files
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

    # a logger has settings of its own; the base of an adapter to start from is looked for in many places
    if not isinstance(target, RecipeTarget) or target.recipe.training.report_to or target.recipe.lora.start:
        raise _UnknownInputsError
    recipe = target.recipe
    schemas = [check.json_schema for check in recipe.evaluation.checks if isinstance(check, JsonSchemaCheck)]
    content = (*_of_tokenizer(target).content, *schemas)
    return Inputs(content, (recipe.output, work_folder(recipe), *recipe.data_paths))


def _of_adapter(target: Target) -> Inputs:
    """Return the folder of an adapter or a merged model, its base, and each place where a base is looked for."""
    from pytest_mistral_lora.conformance.adapter.continued_run import ContinuedRun
    from pytest_mistral_lora.records.base_location import places_of_base

    # the checks of several folders compare them with each other
    if not isinstance(target, AdapterTarget) or len(target.beside) > 1:
        raise _UnknownInputsError
    folder = target.adapter
    base = folder.located_base.folder
    # a configuration beside a log can name an adapter anywhere, and turn up later
    if ContinuedRun(folder).has_log:
        raise _UnknownInputsError
    if base is None:
        # it can turn up in many places
        raise _UnknownInputsError
    content = [target.folder, base.path]
    if target.maker is not None:
        content += _of_tokenizer(target.maker).content
    if snapshot_of(base.path):
        content.append(listing_note(base.path))
    places = [place for recorded in folder.named_bases for place in places_of_base(recorded, target.folder)]
    # a checkpoint has a configuration; the name in a record can lead to any other folder
    content += [place for place in places if (place / MODEL_CONFIG).is_file()]
    configurations = [place / MODEL_CONFIG for place in places]
    # a checkpoint of the run that is newer than the adapter
    times = [folder.tensors_file, *sorted(target.folder.glob(f"checkpoint-*/{folder.tensors_file.name}"))]
    return Inputs(tuple(dict.fromkeys(content)), tuple(dict.fromkeys(configurations)), tuple(times))


def _of_manifest(target: Target) -> Inputs:
    """Return what the checks of an adapter read, its recipe's rows, and the history of its record."""
    found = _of_adapter(target)
    maker = target.maker if isinstance(target, AdapterTarget) else None
    rows = () if maker is None else _of_rows(maker).content
    start = target.adapter.recorded_start if isinstance(target, AdapterTarget) and target.adapter.manifest else None
    before = () if start is None else (start.manifest_file, start.tensors_file)
    content = tuple(dict.fromkeys((*found.content, *rows, *before)))
    return replace(found, content=content, histories=(given_path(target.path),))


INPUTS: Mapping[str, Callable[[Target], Inputs]] = {
    "recipe": _of_recipe,
    "tokenizer": _of_tokenizer,
    "template": _of_tokenizer,
    "mask": _of_tokenizer,
    "dataset": _of_rows,
    "adapter": _of_adapter,
    "merged": _of_adapter,
    "manifest": _of_manifest,
    "transcript": _of_adapter,
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
    key: str
    inputs: Inputs
    before: Mapping[str, str]
    expected: list[Check]
    results: dict[str, Result] = field(default_factory=dict)


class KeptResults:
    """A folder with the results of earlier runs.

    Attributes:
        folder: The folder; it is made when something is written.
        found: The number of checks whose results were found.
        distrust: Why the folder is neither read nor written; empty if it is.
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
        self.distrust: str = ""
        self._seal_key = b""
        try:
            self.distrust = shared_by(folder)
            self._seal_key = b"" if self.distrust else user_key()
        except InputError as error:
            self.distrust = f"{error.place}: {error.found}"
        except (OSError, ValueError) as error:
            self.distrust = str(error)
        self._started = time.time()
        self._entries: dict[str, _Entry] = {}
        self._digests: dict[Path, str] = {}
        self._outputs: dict[str, Path] = {}

    def checks_of(
        self, subject: str, target: Target, settings: Settings, make: Callable[[], Iterable[Check]]
    ) -> Iterator[Check]:
        """Yield the checks of a subject: with the results of an earlier run, or the real ones.

        Args:
            subject: The name of the subject in `collection`; `adapter` for a merged model, too, since what a folder
                holds is not known before it is read.
            target: The target.
            settings: The settings of the run.
            make: Makes the real checks.
        """
        if (
            self.distrust
            or subject not in INPUTS
            or settings.golden_folders
            or settings.update
            or settings.seed is not None
        ):
            yield from make()
            return
        if isinstance(target, RecipeTarget) and target.content is not None:
            # what is judged is what was read, even if the file has changed since
            path = given_path(target.path)
            self._digests.setdefault(path, _content_digest(path, sha256_bytes(target.content)))
        file = self.folder / f"{_hash([str(Path.cwd()), subject, _identity(target)])[:32]}.json"
        key = self._key(settings, subject)
        kept = self._read(file, key)
        if kept is not None:
            if subject == "recipe":
                self._outputs[target.name] = kept.inputs.places[0]
            for kept_subject, case, result in kept.results:
                self.found += 1
                yield Check(target, kept_subject, case, partial(_as_kept, result), is_kept=True)
            return
        checks = [*make()]
        # an error here is a finding of the checks, and then nothing is kept
        with suppress(_UnknownInputsError, MistralLoraError, OSError):
            inputs = INPUTS[subject](target)
            entry = _Entry(file, key, inputs, _state(inputs, self._digest), checks)
            self._entries.update(dict.fromkeys((check.name for check in checks), entry))
        yield from checks

    def output_of(self, target: RecipeTarget) -> Path | None:
        """Return the output folder of a recipe whose results were found; None for another recipe."""
        return self._outputs.get(target.name)

    def take(self, check: Check, result: Result) -> None:
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
                self._write(entry)

    def _digest(self, path: Path) -> str:
        # the subjects of a recipe read the same base
        if path not in self._digests:
            self._digests[path] = _digest(path, self._started)
        return self._digests[path]

    def _key(self, settings: Settings, subject: str) -> str:
        names = (one.name for one in fields(settings) if one.name not in ("shared_folder", "_made"))
        chosen = {name: getattr(settings, name) for name in names}
        return _hash([self._surroundings, self._machine if subject in _OF_WEIGHTS else [], chosen])

    @cached_property
    def _surroundings(self) -> list[Any]:
        """Everything beside options and files that a result can depend on, as plain JSON data."""
        variables = {
            name: value
            for name, value in os.environ.items()
            # a secret opens a door, and changes no verdict; an entry holds nothing that is made of it
            if not _IGNORED.fullmatch(name) and not is_secret_name(name)
        }
        devices = [str(path) for path in sorted([*Path("/dev").glob("nvidia*"), *Path("/dev").glob("kfd")])]
        system = [sys.version, platform.machine(), devices, date.today().isoformat()]
        libraries = {name: _library_files(name) for name in _LIBRARIES}
        return [FORMAT, _own_code(), _installed_packages(), libraries, system, variables]

    @cached_property
    def _machine(self) -> list[Any]:
        """What a model computes with: libraries, processor and driver, as plain JSON data."""
        libraries = {name: _library_files(name) for name in _LIBRARIES_OF_WEIGHTS}
        return [libraries, os.cpu_count(), *map(_first_bytes, ("/proc/cpuinfo", "/proc/driver/nvidia/version"))]

    def _read(self, file: Path, key: str) -> _KeptEntry | None:
        """Return an entry whose inputs are unchanged; None without one."""
        try:
            kept = read_json(file)
            content = kept["content"]
            if not is_sealed(_framed(content), kept["seal"], self._seal_key) or content["key"] != key:
                return None
            # a sealed entry of another target, under the name of this one
            if content["of"] != file.stem:
                return None
            found = _KeptEntry.from_json(content)
            return found if _state(found.inputs, self._digest) == content["state"] else None
        # a damaged file can hold any value
        except (_UnknownInputsError, MistralLoraError, OSError, LookupError, TypeError, ValueError, RecursionError):
            return None

    def _write(self, entry: _Entry) -> None:
        content = {
            "of": entry.file.stem,
            "key": entry.key,
            **{name: [str(path) for path in paths] for name, paths in asdict(entry.inputs).items()},
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
        self._put(entry.file, json.loads(json.dumps(content)))
        for old in self.folder.glob("*.json"):
            with suppress(OSError):  # another process may have removed it
                if time.time() - old.stat().st_mtime > _DAYS * 86_400:
                    old.unlink()

    def _put(self, file: Path, content: Mapping[str, Any]) -> None:
        """Write content and its seal."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_text(file, json.dumps({"content": content, "seal": seal(_framed(content), self._seal_key)}))


@dataclass(frozen=True, slots=True)
class _KeptEntry:
    """An entry as it was read.

    Attributes:
        inputs: The files that its checks read.
        results: Subject, case and result of each check.
    """

    inputs: Inputs
    results: Sequence[tuple[Subject, str, Result]]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> _KeptEntry:
        """Return the entry of the content of a file.

        Raises:
            LookupError: If a part is missing.
            TypeError: If a part is of another type.
            ValueError: If a part is not as it would be written.
        """
        inputs = Inputs(*(tuple(map(Path, _typed(content[part.name], list))) for part in fields(Inputs)))
        checks = [_typed(check, dict) for check in _typed(content["checks"], list)]
        if any(check["subject"] == "recipe" for check in checks) and not inputs.places:
            raise ValueError("a recipe without its output")
        return cls(inputs, [(*_name_of(check), _result_of(check)) for check in checks])


_T = TypeVar("_T")


def _typed(value: Any, kind: type[_T]) -> _T:
    """Return a value of a file.

    Raises:
        TypeError: If it is of another type.
    """
    if type(value) is not kind:
        raise TypeError(f"{value!r:.80} is not of type {kind.__name__}")
    return value


def _name_of(check: Mapping[str, Any]) -> tuple[Subject, str]:
    subject = check["subject"]
    if subject not in INPUTS:
        raise ValueError(f"{subject!r:.80} is not a subject whose results are kept")
    return subject, _typed(check["case"], str)


def _result_of(check: Mapping[str, Any]) -> Result:
    findings = []
    for data in _typed(check["findings"], list):
        if any(type(data[name]) is not str for name in _FINDING_TEXTS) or type(data["more"]) is not int:
            raise TypeError("a text of a finding is none")
        finding = Finding.from_json(data)
        # any wrong type within the tokens, and any text that the rule does not have
        if json.loads(json.dumps(finding.to_json())) != data:
            raise ValueError("a finding that would be written in another way")
        if finding.tokens is not None:
            _require_tokens(finding.tokens)
        findings.append(finding)
    return Result(tuple(findings), _typed(check["not_checked"], str), tuple(_typed(check["facts"], dict).items()))


def _require_tokens(row: TokenRow) -> None:
    """Refuse tokens that no page can show.

    Raises:
        TypeError: If a part is of another type.
    """
    texts: list[Any] = [row.title, *row.sides, *(column.mark for column in row.columns)]
    texts += [column.role for column in row.columns if column.role is not None]
    numbers: list[Any] = [row.first, *(column.turn for column in row.columns if column.turn is not None)]
    for column in row.columns:
        for token in column.tokens:
            if token is not None:
                # an empty list or a 0 is no token either
                _typed(token, ShownToken)
                texts += (token.piece, token.label)
                numbers += (token.position, token.id)
    is_whole = all(len(column.tokens) == len(row.sides) for column in row.columns)
    if (
        not is_whole
        or any(type(text) is not str for text in texts)
        or any(type(number) is not int for number in numbers)
    ):
        raise TypeError("tokens of other types")


_FINDING_TEXTS = ("rule", "found", "place", "expected", "detail", "row", "shape", "fix", "name", "severity")


def _framed(data: Any) -> bytes:
    # in ASCII: the name of a file may have bytes that are not UTF-8
    return json.dumps(data, sort_keys=True).encode()


def _hash(data: Any) -> str:
    return sha256_bytes(_framed(data))


def _can_be_kept(result: Result) -> bool:
    # a check that another one stopped says nothing about its own inputs; and a model may fit into memory the next time
    is_stopped = re.search(r" failed \(ML\d{3}\)$|\bmemory\b", result.not_checked)
    return not is_stopped and all(finding.severity != "error" for finding in result.findings)


def _as_kept(result: Result) -> Result:
    return result


def _identity(target: Target) -> list[Any]:
    """Return how a run names a target, as plain JSON data."""
    more: list[Any] = []
    if isinstance(target, JudgedTarget):
        more = [_identity(target.judge), None if target.objective is None else str(target.objective)]
    elif isinstance(target, AdapterTarget):
        maker = None if target.maker is None else _identity(target.maker)
        more = [maker, str(target.base), [str(path) for path in target.beside]]
    return [type(target).__name__, target.name, str(target.path), target.oracle_name, target.trains, more]


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
        **{f"time {path}": _time(path) for path in inputs.times},
        **{f"history {path}": _commit(path) for path in inputs.histories},
    }


def _kind(path: Path) -> str:
    """Return the destination of a path, and whether a file or a folder is there."""
    real = os.path.realpath(path)
    existing = next(name for name in (real, *map(str, Path(real).parents)) if os.path.lexists(name))
    return f"{real} {existing} {stat.S_IFMT(Path(existing).lstat().st_mode)}"


def _time(file: Path) -> str:
    return str(file.stat().st_mtime_ns) if file.is_file() else "missing"


def _commit(folder: Path) -> str:
    """Return the commit that a folder is at, or why there is none.

    Raises:
        _UnknownInputsError: If the history is cut off: more of it may be fetched for the same commit.
    """
    if not is_in_repository(folder):
        return "no repository"
    try:
        answer = ask_git(folder, "rev-parse", "HEAD", "--is-shallow-repository").decode().split()
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
    if answer[-1] != "false":
        raise _UnknownInputsError
    return answer[0]


def _first_bytes(path: str) -> str:
    """Return the beginning of a file of the system: of many equal processors, the first one."""
    with suppress(OSError), Path(path).open("rb") as file:
        # the clock rate is another one at each moment
        return re.sub(rb"(?m)^cpu MHz.*$", b"", file.read(2048)).decode(errors="replace")
    return ""


def _digest(path: Path, since: float = math.inf) -> str:
    """Return a hash of the content of a file or a folder, or that it is missing.

    Args:
        path: The file or folder.
        since: The time from which no file may have changed: it may have been read before.

    Raises:
        _UnknownInputsError: If a folder below has a link to a folder, or anything but files, or a file has just
            changed.
        OSError: If a file cannot be read.
        InputError: If a file cannot be read.
    """
    if not os.path.lexists(path):
        return "missing"
    if not path.is_dir():
        return _file_digest(path, since)
    parts = [
        [os.path.relpath(entry, path), "folder" if entry.is_dir() else _file_digest(Path(entry), since)]
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


def _content_digest(file: Path, sha256: str) -> str:
    return f"{sha256} {os.path.realpath(file) if file.is_symlink() else ''}"


def _file_digest(file: Path, since: float) -> str:
    status = file.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_ctime > since:
        raise _UnknownInputsError
    if status.st_size <= _LARGE:
        return _content_digest(file, sha256_file(file))
    link = os.path.realpath(file) if file.is_symlink() else ""
    if time.time() - status.st_ctime < _UNSETTLED:
        raise _UnknownInputsError
    # the time of the last change of the inode cannot be set, unlike that of the content
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {link}"


def _own_code() -> str:
    """Return the state of this package's files: two of its commits can have the same version."""
    states = []
    for folder in (Path(__file__).parents[1], goldens_folder()):
        for entry in _entries_below(folder):
            # the interpreter writes bytecode, and first a temporary file of another name, while other processes look
            if not entry.is_dir() and "__pycache__" not in entry.path:
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


def _library_files(name: str) -> str:
    """Return the state of a library's files: an edit in place changes neither its version nor its metadata.

    Size and time of each file are compared; the content if the library is installed from a folder of its sources,
    where an editor or a checkout can write several times within the resolution of the file system.
    """
    from importlib.util import find_spec

    spec = find_spec(name)
    if spec is None or spec.origin is None:
        return "missing"
    folder = Path(spec.origin).parent
    digest = sha256_file if _is_editable(name, folder) else _size_and_time
    states = [spec.origin]
    for parent, folders, files in os.walk(folder):
        # compiled files follow their sources, and no check compiles the ten thousand headers of torch
        folders[:] = sorted(name for name in folders if name not in ("__pycache__", "include"))
        for file in sorted(files):
            with suppress(OSError):  # a link to nowhere, or removed since
                states.append(f"{parent}/{file} {digest(Path(parent, file))}")
    return _hash(states)


def _size_and_time(file: Path) -> str:
    # not the time of the inode: it changes with each hard link, by which installers share files
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_editable(name: str, folder: Path) -> bool:
    """Return whether a library is imported from elsewhere than the folder that an installer copied it to."""
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        installed = distribution(name.replace("_", "-"))
    except PackageNotFoundError:
        return True
    try:
        source = json.loads(installed.read_text("direct_url.json") or "{}")
        is_linked = bool(source.get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        is_linked = True
    return is_linked or not folder.is_relative_to(str(installed.locate_file("")))
