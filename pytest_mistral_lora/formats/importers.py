"""The configurations of trainers as sources of rows: what a trainer tells of its own, and how all of them are asked."""

from __future__ import annotations

import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_mistral_lora.chat.reading import is_folder
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.files import source_files
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.programs.registry import TRAINERS_GROUP, Registry, loaded

if TYPE_CHECKING:
    from pydantic import BaseModel

    from pytest_mistral_lora.formats.convert import Source


class Importer(ABC):
    """The way from a trainer's configuration to its rows: `Trainer.importer` names the module and the object.

    The importer of a trainer whose YAML file has `my_model: FOLDER` and `my_rows: rows.jsonl`:

        class MyImporter(Importer):
            title, model_key, rows_key = "my-trainer", "my_model", "my_rows"
            own_keys = frozenset({"my_rows", "my_rank"})

            def declares_rows(self, path, config):
                return isinstance(config.get("my_rows"), str)

            def sources(self, path, config, names):
                return [Source(file) for file in source_files(declared_path(path, config["my_rows"]))], []

    A `config` is the content of the file as plain data. Each method takes any mapping, also that of another program: a
    value can be of any type.

    Attributes:
        title: The trainer's name in texts.
        model_key: The key of the model that it trains.
        own_keys: Keys that identify its configuration beside `model_key`; one of them is enough.
        rows_key: The key that declares rows.
        names_in: What gives data sets names, which `--dataset` and `dataset` of a recipe's source take, in words; empty
            if its data sets have no names.
        json_files: The pattern of the names of JSON files that declare rows, as for `fnmatch`; empty if only YAML files
            do.
    """

    title: ClassVar[str]
    model_key: ClassVar[str]
    own_keys: ClassVar[frozenset[str]]
    rows_key: ClassVar[str]
    names_in: ClassVar[str] = ""
    json_files: ClassVar[str] = ""

    def recognises(self, config: Mapping[Any, Any]) -> bool:
        """Return whether a mapping is a configuration of this trainer, with rows or without."""
        return self.model_key in config and bool(self.own_keys & config.keys())

    def base_of(self, config: Mapping[Any, Any]) -> str | None:
        """Return the folder or the Hub name of the model that a configuration trains; None if it has none."""
        base = config.get(self.model_key)
        return base if isinstance(base, str) else None

    @abstractmethod
    def declares_rows(self, path: Path, config: Mapping[Any, Any]) -> bool:
        """Return whether a file declares rows as this trainer reads them, with the key of its model or without.

        Args:
            path: The file: YAML, or JSON of a name that `json_files` matches.
            config: Its content.
        """

    @abstractmethod
    def sources(self, path: Path, config: Mapping[Any, Any], names: Collection[str]) -> tuple[list[Source], list[str]]:
        """Return the files that a configuration declares with their layouts, in order, and remarks for the report.

        A remark is a sentence on a setting that rows do not have, and that is ignored.

        Args:
            path: The file; `declares_rows` is true of it.
            config: Its content.
            names: The data sets to take; empty for all that it trains on. Always empty without `names_in`.

        Raises:
            InputError: If a file is missing, or a declaration is not supported, with the place of its key.
        """

    def answer(self, path: Path, config: Mapping[Any, Any], runner: str) -> tuple[str, str] | None:
        """Return what a file is, and the commands that read it; None for a file of another program.

        Args:
            path: The file.
            config: Its content.
            runner: The trainer's name on the command line.
        """
        if not self.recognises(config):
            return None
        base, file = self.base_of(config), shlex.quote(str(path))
        is_here = base is not None and is_folder(base)
        tokenizer = shlex.quote(base) if base is not None and is_here else "PATH"
        named = "" if base is None or is_here else f", with the folder of {base:.80} as PATH"
        judged = f"mistral-lora check --runner {runner} --config {file} --tokenizer {tokenizer}"
        step = f"Judge its rows{named}: {judged}. Convert its data: mistral-lora import {file} --to rows.jsonl"
        return f"a configuration of {self.title}", step


@cache
def importers() -> Mapping[str, Importer]:
    """Return the importers of this package's trainers, by the name of the trainer.

    A file does not name its trainer, and code of another package runs only if you use a name of it: that is not asked.
    """
    # of any kind: `formats` knows nothing of a trainer but where its importer is
    trainers = Registry(TRAINERS_GROUP, "trainer", object)
    places = {name: getattr(trainers[name], "importer", "") for name in trainers.ours}
    return {name: loaded(place, Importer) for name, place in places.items() if place}  # type: ignore[type-abstract]


def may_declare(path: Path) -> bool:
    """Return whether a file may declare rows, by its name: a YAML file, or JSON that some trainer has for that."""
    if is_yaml(path):
        return True
    patterns = (importer.json_files for importer in importers().values()) if path.suffix == ".json" else ()
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def is_yaml(path: Path) -> bool:
    """Return whether a file is YAML, by its name."""
    return path.suffix.lower() in (".yaml", ".yml")


def trainer_answer(path: Path, config: Mapping[Any, Any]) -> tuple[str, str] | None:
    """Return which trainer's configuration a file is, and the commands that read it; None if no trainer is known."""
    answers = (importer.answer(path, config, name) for name, importer in importers().items())
    return next(filter(None, answers), None)


def declared_path(config: Path, name: str) -> Path:
    """Return a path of a configuration: relative to the working directory, as for trainers, or to the file."""
    path = Path(name)
    return path if path.exists() or path.is_absolute() else config.parent / name


def declared_split(declared: Mapping[str, Any], key: str, place: object) -> str:
    """Return the split that a declaration names; `train` without one.

    Raises:
        InputError: If it is a part of a split, such as `train[:10%]`.
    """
    split = str(declared.get(key) or "train")
    if not re.fullmatch(r"[\w.-]+", split):
        raise InputError(f"{key}: {split!r} is not followed", place=str(place), expected="a whole split, such as train")
    return split


def declared_files(config: Path, entry: Mapping[str, Any], place: Place) -> Iterator[Path]:
    """Yield the files of an entry with the arguments of `datasets.load_dataset`: `path`, `data_files`, `split`.

    Args:
        config: The configuration.
        entry: The entry.
        place: Its place.

    Raises:
        InputError: If it names no file, or a file of another machine.
    """
    named = entry.get("data_files") or entry.get("path")
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, Sequence) or not names:
        raise InputError("no `path`", place=place, expected="a file or folder of this machine")
    for name in map(str, names):
        inside = Path(str(entry.get("path", "")), name)
        name = str(inside) if entry.get("data_files") and inside.exists() else name
        yield from source_files(declared_path(config, name), declared_split(entry, "split", place))


def require_form(model: type[BaseModel], entry: Any, place: Place) -> None:
    """Refuse an entry with a value of the wrong type.

    Args:
        model: The form of the entry.
        entry: The entry.
        place: Its place.

    Raises:
        InputError: With the key and the value.
    """
    from pydantic import ValidationError

    from pytest_mistral_lora.records.schema import error_in_words

    try:
        model.model_validate(entry)
    except ValidationError as error:
        first = error.errors()[0]
        found = ": ".join([*filter(None, [".".join(map(str, first["loc"]))]), repr(first["input"])])[:200]
        raise InputError(found, place=place, expected=error_in_words(first, model).removeprefix("expected ")) from error


def require_no_keys(entry: Mapping[str, Any], keys: Collection[str], place: Place) -> None:
    """Refuse settings of an entry that choose rows or change their text, and are not followed here.

    Raises:
        InputError: With the first of the keys that has a value.
    """
    for key in keys:
        if entry.get(key):
            raise InputError(f"{key}: {entry[key]!r} is not followed", place=place, expected=f"no {key}")


START_REMARK = "is not imported: name that adapter as lora.start of your recipe"
"""The remark on a key that names an adapter to go on from."""


def remarks_on(path: Path, config: Mapping[Any, Any], keys: Collection[str], remark: str) -> list[str]:
    """Return a remark on each of some keys that a configuration has: `KEY: VALUE of FILE REMARK`."""
    return [f"{key}: {config[key]} of {path} {remark}" for key in keys if config.get(key)]
