"""The files of a folder that decide how a conversation becomes ids, read as untrusted data.

A file is opened only after its kind, its size and the target of its link are checked.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pytest_mistral_lora.chat.oracle.hazards import MAX_CONTAINERS, json_hazard
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN
from pytest_mistral_lora.chat.reading import loads_strict
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
    """A file, read: its hash, and the value of a JSON file or the text of a template, or its fault."""

    sha256: str
    value: Any
    fault: Fault | None


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer and template files of a checkpoint folder, or one tokenizer file.

    Attributes:
        path: The folder or file.
        read: Returns the bytes of a file, which may have been read already.
    """

    path: Path
    read: Callable[[Path], bytes] = field(default=Path.read_bytes, compare=False, repr=False)
    _contents: dict[str, _FileContent] = field(default_factory=dict, compare=False, repr=False)
    _faults_within: dict[str, Fault | None] = field(default_factory=dict, compare=False, repr=False)

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

    @cached_property
    def faults(self) -> dict[str, Fault]:
        """The fault of each file that must not be used, by name."""
        faults = {name: self._hazard(name) or self._content(name).fault for name in self.names}
        return {name: fault for name, fault in faults.items() if fault is not None}

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
        usable = name in self.names and name not in self.faults
        value: dict[str, Any] = self._content(name).value if usable else {}
        return value

    def text(self, name: str) -> str | None:
        """Return the text of a template file; None if the file is missing or has a fault."""
        usable = name in self.names and name not in self.faults
        text: str | None = self._content(name).value if usable else None
        return text

    @cached_property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each file that can be read, in hex, by name."""
        return {name: self._content(name).sha256 for name in self.names if self._hazard(name) is None}

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
        """Return the bytes of a file without a hazard; it is read once."""
        if name in self._contents:
            return self._contents[name]
        data = self.read(self.file(name))
        value: Any = None
        fault = None
        if data.startswith(_POINTER):
            fault = Fault("form", "is a pointer of Git LFS, not the file")
        elif name.endswith((".json", ".jinja")):
            try:
                # universal newlines, as transformers reads a template
                text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8").read()
                if data.count(b"{") + data.count(b"[") > MAX_CONTAINERS:
                    # in memory they take twenty times their size on disk
                    raise ValueError(f"more than {MAX_CONTAINERS:,} lists and objects")
                value = loads_strict(text) if name.endswith(".json") else text
                if name.endswith(".json") and not isinstance(value, dict):
                    fault = Fault("form", "is not a JSON object")
                elif name == TOKENIZER_CONFIG:
                    fault = _escaping_name(value)
                elif name == TOKENIZER_JSON and (found := json_hazard(value)):
                    fault = Fault("hazard", found)
            except UnicodeDecodeError as error:
                fault = Fault("form", f"is not UTF-8: byte {data[error.start]:#04x} at {error.start:,}")
            except ValueError as error:
                fault = Fault("form", str(error) if data.strip() else "is empty")
        self._contents[name] = _FileContent(hashlib.sha256(data).hexdigest(), value, fault)
        return self._contents[name]


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
