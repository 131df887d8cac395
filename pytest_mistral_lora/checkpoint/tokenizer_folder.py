"""The files of a folder that decide how a conversation becomes ids, read as untrusted data.

A file is opened only after its kind, its size and the target of its link are checked.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pytest_mistral_lora.chat.oracle.hazards import MAX_CONTAINERS, json_hazard
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN, oracle_file, shipped_files
from pytest_mistral_lora.chat.reading import loads_strict, open_regular
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.checkpoint.hub_cache import link_homes
from pytest_mistral_lora.errors import TokenizerError
from pytest_mistral_lora.places import NOWHERE, NamedSource, Place

TOKENIZER_JSON = "tokenizer.json"
SPM_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
MODEL_CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PARAMS = "params.json"
"""Mistral's own configuration: servers that know Mistral's format read it, and transformers does not."""
TEMPLATE = "chat_template.jinja"
OLD_TEMPLATE = "chat_template.json"
PROCESSOR_CONFIG = "processor_config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
MORE_TEMPLATES = "additional_chat_templates"

NO_ORACLE = "none"
"""The declaration that no Mistral tokenizer applies to a folder."""

_MIB = 1 << 20
LIMITS = {
    TEKKEN: 64 * _MIB,
    TOKENIZER_JSON: 64 * _MIB,
    SPM_MODEL: 64 * _MIB,
    "*.model.v[0-9]*": 64 * _MIB,
    TOKENIZER_CONFIG: 16 * _MIB,
    SPECIAL_TOKENS: 16 * _MIB,
    ADDED_TOKENS: 16 * _MIB,
    MODEL_CONFIG: 16 * _MIB,
    GENERATION_CONFIG: 16 * _MIB,
    PARAMS: 16 * _MIB,
    OLD_TEMPLATE: 16 * _MIB,
    PROCESSOR_CONFIG: 16 * _MIB,
    PREPROCESSOR_CONFIG: 16 * _MIB,
    TEMPLATE: _MIB,
    f"{MORE_TEMPLATES}/*.jinja": _MIB,
}
"""The files that are read, by name or pattern, and the limit of each in bytes: far more than any release has."""

_WITH_HAZARDS = (TOKENIZER_CONFIG, TOKENIZER_JSON)
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a file that does not depend on the tokenizer.

    Attributes:
        kind: `outside`: a link out of the folder; `hazard`: it must not be opened; `form`: bad content.
        found: A description of the fault.
    """

    kind: Literal["outside", "hazard", "form"]
    found: str


@dataclass(frozen=True, slots=True)
class _FileContent:
    """The value of a JSON file, the text of a template or the bytes of `tokenizer.model`; or the fault of the file."""

    value: Any
    fault: Fault | None


def read_regular(file: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        InputError: As for `open_regular`.
    """
    with open_regular(file) as content:
        return content.read()


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer and template files of a checkpoint folder, or one tokenizer file.

    A file is opened and hashed once, if its value is asked for before the oracle is: a run over rows alone keeps
    neither the bytes nor the value of a large file.

    Attributes:
        path: The folder or file.
        read: Returns the bytes of a file, which may have been read already.
    """

    path: Path
    read: Callable[[Path], bytes] = field(default=read_regular, compare=False, repr=False)
    _contents: dict[str, _FileContent] = field(default_factory=dict, compare=False, repr=False)
    _faults_of: dict[str, Fault | None] = field(default_factory=dict, compare=False, repr=False)
    _faults_within: dict[str, Fault | None] = field(default_factory=dict, compare=False, repr=False)
    _hashes: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    _unused: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)

    def alone(self, name: str) -> TokenizerFiles:
        """Return one of the files without those beside it; what has been read of it is shared."""
        return TokenizerFiles(self.file(name), self.read, _hashes=self._hashes, _unused=self._unused)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the existing files, relative to the folder, in order."""
        if not self.path.is_dir():
            return (self.path.name,)
        entries = [*self.path.iterdir()]
        more = self.path / MORE_TEMPLATES
        entries += more.iterdir() if more.is_dir() else ()
        names = (entry.relative_to(self.path).as_posix() for entry in entries)
        return tuple(sorted(name for name in names if _limit(name) is not None))

    def file(self, name: str) -> Path:
        """Return the path of one of the files."""
        return self.path / name if self.path.is_dir() else self.path

    def place(self, name: str = "") -> Place:
        """Return the place of one of the files; without a name, that of the whole folder or file."""
        return Place.of(self.file(name) if name else self.path)

    def is_file(self, name: str) -> bool:
        """Return whether the folder has a regular file of this name, perhaps by a link."""
        return (self.path / name).is_file()

    @property
    def of_folder(self) -> TokenizerFiles:
        """The files of the folder: for a single tokenizer file, those beside it."""
        return self if self.path.is_dir() else TokenizerFiles(self.path.parent)

    @property
    def oracle_file(self) -> Path | None:
        """The Mistral tokenizer file; None if there is none."""
        return oracle_file(self.path)

    @property
    def weights(self) -> list[Path]:
        """The safetensors files of the model beside the tokenizer."""
        return sorted(self.path.glob("model*.safetensors"))

    @cached_property
    def faults(self) -> dict[str, Fault]:
        """The fault of each file that must not be used, by name."""
        faults = {name: self.fault_of(name) for name in self.names}
        return {name: fault for name, fault in faults.items() if fault is not None}

    def fault_of(self, name: str) -> Fault | None:
        """Return the fault of an existing file that must not be used; None without a fault. No other file is read."""
        if name not in self._faults_of:
            self._faults_of[name] = self._hazard(name) or self._content(name).fault
        return self._faults_of[name]

    def refuse_hazards(self) -> None:
        """Refuse a folder with a dangerous file, before any library opens it.

        Raises:
            TokenizerError: If a file is not a regular file, is huge, or is a link that leaves the folder.
        """
        for name in self.names:
            fault = self._hazard(name)
            if fault is None and name in _WITH_HAZARDS:
                if name not in self._faults_within:
                    was_read = name in self._contents
                    self._faults_within[name] = self._content(name).fault
                    if name == TOKENIZER_JSON and not was_read:
                        # the parsed file takes a hundred megabytes, and only the checks of the folder need it again
                        self._contents.pop(name)
                fault = self._faults_within[name]
            # bad JSON is for the loader to report: only what it would do with good JSON is a hazard
            if fault is not None and fault.kind != "form":
                expected = "a file of the folder" if fault.kind == "outside" else "a file as releases have it"
                raise TokenizerError(fault.found, place=str(self.file(name)), expected=expected)

    def json(self, name: str) -> dict[str, Any]:
        """Return the object of a JSON file; an empty one if the file is missing or has a fault."""
        usable = name in self.names and self.fault_of(name) is None
        value: dict[str, Any] = self._content(name).value if usable else {}
        return value

    def text(self, name: str) -> str | None:
        """Return the text of a template file; None if the file is missing or has a fault."""
        usable = name in self.names and self.fault_of(name) is None
        text: str | None = self._content(name).value if usable else None
        return text

    def spm_model(self) -> bytes | None:
        """Return the bytes of `tokenizer.model`; None if the file is missing or has a fault."""
        usable = SPM_MODEL in self.names and self.fault_of(SPM_MODEL) is None
        data: bytes | None = self._content(SPM_MODEL).value if usable else None
        return data

    def sha256(self, name: str) -> str:
        """Return the SHA-256 of a file without a hazard, in hex.

        Raises:
            InputError: If the file cannot be read.
        """
        if name not in self._hashes:
            # the bytes stay for the next caller, who opens what has been hashed
            self._unused[name] = self.take(name)
        return self._hashes[name]

    def take(self, name: str) -> bytes:
        """Return the bytes of a file without a hazard, for the caller to keep: a second call reads the file again.

        Raises:
            InputError: If the file cannot be read.
        """
        data = self._unused.pop(name, None)
        if data is None:
            data = self._bytes(name)
        self._hashes.setdefault(name, sha256_bytes(data))
        return data

    def release(self, name: str) -> None:
        """Forget the bytes of a file that nobody has taken."""
        self._unused.pop(name, None)

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that can be read, in hex, by name."""
        return {name: self.sha256(name) for name in self.names if self._hazard(name) is None}

    @cached_property
    def mistral_files(self) -> tuple[str, ...]:
        """The names of Mistral's own tokenizer files: `tekken.json` and `tokenizer.model.vN`."""
        return tuple(name for name in self.names if name == TEKKEN or fnmatch(name, "*.model.v[0-9]*"))

    def _hazard(self, name: str) -> Fault | None:
        file = self.file(name)
        # Path.resolve raises on a loop of links, which is to be reported as a fault
        target = Path(os.path.realpath(file))
        if self.path.is_dir() and not any(target.is_relative_to(root) for root in link_homes(self.path)):
            return Fault("outside", f"links out of the folder, to {target}")
        try:
            status = file.stat()
        except OSError as error:
            return Fault("hazard", f"cannot be read: {error.strerror}")
        # reading a pipe or a device would never end
        if not stat.S_ISREG(status.st_mode):
            return Fault("hazard", "is a directory" if stat.S_ISDIR(status.st_mode) else "is not a regular file")
        most = _limit(name)
        if most is not None and status.st_size > most:
            return Fault("hazard", f"has {status.st_size:,} bytes, more than {most:,}")
        return None

    def _content(self, name: str) -> _FileContent:
        """Return the content of a file without a hazard; it is read once."""
        if name in self._contents:
            return self._contents[name]
        data = self.take(name)
        value: Any = None
        fault = None
        if data.startswith(_POINTER):
            fault = Fault("form", "is a pointer of Git LFS, not the file")
        elif name.endswith((".json", ".jinja")) and self.path.parent != shipped_files():
            try:
                # universal newlines, as transformers reads a template
                text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
                if data.count(b"{") + data.count(b"[") > MAX_CONTAINERS:
                    # in memory they take twenty times their size on disk
                    raise ValueError(f"more than {MAX_CONTAINERS:,} lists and objects")
                value = loads_strict(text) if name.endswith(".json") else text
                if name.endswith(".json") and not isinstance(value, dict):
                    fault = Fault("form", "is not a JSON object")
                elif name == TEKKEN:
                    # a hundred megabytes, of which mistral-common makes its own
                    value = None
                elif name == TOKENIZER_CONFIG:
                    fault = _escaping_name(value)
                elif name == TOKENIZER_JSON and (found := json_hazard(value)):
                    fault = Fault("hazard", found)
            except UnicodeDecodeError as error:
                fault = Fault("form", f"is not UTF-8: byte {data[error.start]:#04x} at {error.start:,}")
            except ValueError as error:
                fault = Fault("form", str(error) if data.strip() else "is empty")
        elif name == SPM_MODEL:
            value = data
        if name in self.mistral_files:
            self._unused[name] = data  # the oracle is made of it
        self._contents[name] = _FileContent(value, fault)
        return self._contents[name]

    def _bytes(self, name: str) -> bytes:
        return self.read(self.file(name))


@dataclass(frozen=True)
class GivenFiles(TokenizerFiles):
    """Files that a program has in memory, under the names that they would have in a folder. No disk is asked.

    Attributes:
        path: The name of the tokenizer, as `place` shows it; nothing lies there.
        home: The place of the tokenizer.
        contents: The content of each file, by name.
        places: The place of each file, by name.
    """

    home: Place = NOWHERE
    contents: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)
    places: Mapping[str, Place] = field(default_factory=dict)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the files, in order."""
        return tuple(sorted(self.contents))

    def place(self, name: str = "") -> Place:
        """Return the place of one of the files; that of the tokenizer without a name, or if the file is not given."""
        return self.places.get(name, self.home)

    def is_file(self, name: str) -> bool:
        """Return whether the program has a file of this name."""
        return name in self.contents

    @property
    def of_folder(self) -> TokenizerFiles:
        """The files themselves."""
        return self

    @property
    def oracle_file(self) -> Path | None:
        """The Mistral tokenizer file: none is on a disk."""
        return None

    @property
    def weights(self) -> list[Path]:
        """The safetensors files: none is on a disk."""
        return []

    def _hazard(self, name: str) -> Fault | None:
        return None

    def _bytes(self, name: str) -> bytes:
        return self.contents[name]


def _limit(name: str) -> int | None:
    return next((most for pattern, most in LIMITS.items() if fnmatch(name, pattern)), None)


def _escaping_name(config: dict[str, Any]) -> Fault | None:
    """Refuse the name of a template that transformers would save outside of the folder."""
    templates = config.get("chat_template")
    names = (
        [template.get("name") for template in templates if isinstance(template, dict)]
        if isinstance(templates, list)
        else []
    )
    names += templates if isinstance(templates, dict) else []
    bad = [name for name in names if not (isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*", name))]
    return Fault("hazard", f"names a chat template {bad[0]!r}") if bad else None


KEY = "chat_template"


def template_places(files: TokenizerFiles) -> dict[str, dict[Place, str]]:
    """Return each template's text by its name (`default`, `tool_use`, …) and by its place within the folder.

    A newline at the very end is left out: Jinja does so, too.
    """
    found: list[tuple[str, Place, Any]] = []
    for file in files.names:
        path = PurePosixPath(file)
        if path.suffix == ".jinja":
            name = path.stem if path.parent.name == MORE_TEMPLATES else "default"
            found.append((name, Place.of(file), files.text(file)))
    for file in (TOKENIZER_CONFIG, OLD_TEMPLATE, PROCESSOR_CONFIG):
        # one text, texts by name, or a list of names and texts: transformers loads all three
        value = files.json(file).get(KEY)
        if isinstance(value, list):
            entries = [(item.get("name", "default"), item.get("template")) for item in value if isinstance(item, dict)]
        else:
            entries = list(value.items()) if isinstance(value, dict) else [("default", value)]
        found += [(str(name), Place.of(file) / KEY, text) for name, text in entries]
    places: dict[str, dict[Place, str]] = {}
    for name, place, text in found:
        if isinstance(text, str):
            places.setdefault(name, {})[place] = text.removesuffix("\n")
    return places


def loaded_place(files: TokenizerFiles) -> Place:
    """Return the place, within the folder, of the template that transformers loads; empty if no template exists."""
    places = template_places(files).get("default", {})
    # the order of `PreTrainedTokenizerBase.from_pretrained`: a separate file goes before the key
    order = (Place.of(TEMPLATE), Place.of(f"{MORE_TEMPLATES}/default.jinja"), Place.of(TOKENIZER_CONFIG) / KEY)
    return next((place for place in order if place in places), NOWHERE)


def in_folder(folder: Path, place: Place) -> Place:
    """Return a place within a folder as a place for users, who name the folder."""
    return replace(place, source=NamedSource(str(folder / place.source.name)))


def own_template(files: TokenizerFiles) -> str | None:
    """Return the text of a folder's own chat template; None if it has none."""
    return template_places(files).get("default", {}).get(loaded_place(files))
