"""Recognise a path by its content: a recipe, rows, encoded rows, an adapter, a merged model, or a tokenizer."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.container import LINES, VALUES, Container, container_of
from pytest_mistral_lora.chat.reading import (
    JSON_LIMIT,
    first_values,
    opened,
    parse_json,
    read_bounded,
    read_json,
    similar_path,
)
from pytest_mistral_lora.chat.remedies import DATA_SUFFIXES, ROW_SUFFIXES, import_step
from pytest_mistral_lora.conformance.targets import EMBEDDED, is_shipped
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.formats.importers import is_yaml, may_declare, trainer_answer
from pytest_mistral_lora.formats.recognition import ids_key, recognise
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.manifest import MANIFEST, is_foreign

KINDS = {
    "recipe": "a recipe (YAML with base, data, training, output)",
    "rows": "rows (JSON Lines with messages)",
    "encoded": "encoded rows (records with input_ids, labels, of a file or a folder)",
    "adapter": "a folder of an adapter or merged model (adapter_config.json, manifest.json)",
    "gguf": "a GGUF file of a model or an adapter, or a file by which a server makes a model of one",
    "tokenizer": "a checkpoint or tokenizer folder (tekken.json, tokenizer.json, tokenizer.model), or such a file",
}
"""The kinds of paths to check, each with its marks."""

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "manifest.json")
_TOKENIZERS = ("tekken.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_RECIPE_KEYS = frozenset({"base", "backend", "data", "lora", "training", "evaluation", "output", "card", "deployment"})
_CHECK = "mistral-lora check"
_HEAD = 1 << 16
_YAML_BYTES = (1 << 20) + 1
"""One byte more than a recipe has: a larger file is refused where it is parsed."""


@dataclass(frozen=True, slots=True)
class RecognisedPath:
    """A path and its kind.

    Attributes:
        path: The path.
        kind: A key of `KINDS`.
        title: The kind in words, with the evidence.
        content: The bytes of a recipe or a manifest that have been read, for whoever parses them; else None.
    """

    path: Path
    kind: str
    title: str
    content: bytes | None = field(default=None, compare=False, repr=False)

    def to_json(self) -> dict[str, str]:
        """Return the path and its kind as plain data."""
        return {"path": str(self.path), "kind": self.kind, "title": self.title}


def recognised(path: Path, base: Path | None = None, kind: str = "") -> RecognisedPath:
    """Return a path with its kind.

    Args:
        path: A file or folder, or the name of a shipped tokenizer.
        base: The base checkpoint's folder of the adapters: with it, another folder of full weights is a merged model.
        kind: A key of `KINDS`; None to recognise the kind.

    Raises:
        InputError: If the path is missing or cannot be checked; for a file of another tool, with the command that reads
            it.
    """
    if is_shipped(path):
        return RecognisedPath(path, "tokenizer", "a tokenizer that mistral-common ships")
    if not path.exists():
        names = EMBEDDED if path.parent == Path() else ()
        raise InputError(f"no such file or folder{similar_path(path, names)}", place=str(path))
    if kind:
        return RecognisedPath(path, kind, f"{KINDS[kind].partition(' (')[0]}, as --as declares")
    if path.is_dir():
        return _folder(path, base)
    if not path.is_file():
        raise InputError("not a regular file", place=str(path), expected="a file or a folder")
    return _file(path)


def _folder(path: Path, base: Path | None) -> RecognisedPath:
    # even a folder, a pipe or a broken link: the check `files` names it
    marks = [name for name in _ADAPTERS if (path / name).exists() or (path / name).is_symlink()]
    content = None
    if marks == [MANIFEST]:  # beside an adapter, the checks read it, and report another tool's manifest
        with suppress(InputError):  # the check of its schema reports the error
            content = read_bounded(inside(path, MANIFEST))
            marks = [] if is_foreign(parse_json(content, path / MANIFEST)) else marks
    weights = sorted(file.name for file in path.glob("*.safetensors") if file.name not in _ADAPTERS)
    if marks:
        merged = marks == [MANIFEST] and weights
        title = f"{'a merged model' if merged else 'an adapter'} ({', '.join(marks)})"
        return RecognisedPath(path, "adapter", title, content)
    if base is not None and path.resolve() != base.resolve() and any(path.glob("model*.safetensors")):
        return RecognisedPath(path, "adapter", f"a merged model ({weights[0]}, and --base is another folder)")
    marks = [name for name in _TOKENIZERS if (path / name).exists()]
    marks += sorted(file.name for file in path.glob("*.model.v*"))
    if marks or weights or (path / "config.json").exists():
        title = "a checkpoint folder" if weights or (path / "config.json").exists() else "a tokenizer folder"
        shown = marks or weights or ["config.json"]
        return RecognisedPath(path, "tokenizer", f"{title} ({', '.join(shown[:3])})")
    below = _below(path)
    if below is None and (data := _data_in(path)):
        from pytest_mistral_lora.formats.sources import row_files

        if encoded := _encoded_folder(path):
            return encoded
        with suppress(InputError):
            # one file, or the shards of one table
            files = row_files(path)
            return RecognisedPath(path, "rows", f"rows ({', '.join(file.path.name for file in files[:3])}), converted")
        below = data[0]
    raise _unknown(path, f"Name what is in it: {_CHECK} {shlex.quote(str(below))}" if below is not None else "")


def _data_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.name.endswith(DATA_SUFFIXES) and file.is_file())


def _below(folder: Path) -> Path | None:
    """Return what is meant by the folder above it: the newest adapter, or else a recipe or a model; None for data."""
    if adapters := [file for depth in ("*", "*/*") for file in folder.glob(f"{depth}/adapter_config.json")]:
        # by time, not by name: `checkpoint-100` comes after `checkpoint-20`
        return max(adapters, key=lambda file: file.stat().st_mtime_ns).parent
    bases = sorted(file.parent for name in ("config.json", *_TOKENIZERS) for file in folder.glob(f"*/{name}"))
    return next(iter([*sorted(folder.glob("recipe*.y*ml")), *bases, *sorted(folder.glob("*.gguf"))]), None)


def _encoded_folder(path: Path) -> RecognisedPath | None:
    """Recognise a folder whose records have ids, by the first records of each file; None for another folder.

    Raises:
        InputError: If only some of its files have ids and they are not parts of one table; or if a file of a saved
            dataset is missing.
    """
    from pytest_mistral_lora.formats.files import every_file, source_files
    from pytest_mistral_lora.formats.records import first_records

    found: dict[Path, str] = {}
    for file in every_file(path):
        with suppress(InputError):  # the check of the rows reports the error
            container, records = first_records(file)
            key = next((key for record in records if (key := ids_key(record.value))), "")
            found[file] = f"{container} with {key}" if key else ""
    titles = [title for title in found.values() if title]
    if not titles:
        return None
    if not all(found.values()):
        try:
            source_files(path)
        except InputError as error:
            words = shlex.join(["mistral-lora", "check", *map(str, found), "--tokenizer", "PATH"])
            step = f"Name its files, so that each is judged as what it holds: {words}"
            fault = f"a folder of which {len(titles)} of {len(found)} files are encoded rows"
            raise InputError(f"this is {fault}", place=str(path), next_step=step) from error
    names = ", ".join(file.relative_to(path).as_posix() for file in [*found][:3])
    return RecognisedPath(path, "encoded", f"encoded rows ({titles[0]}: {names})")


def _file(path: Path) -> RecognisedPath:
    try:
        with opened(path) as file:
            head = file.read(_YAML_BYTES if is_yaml(path) else _HEAD)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", place=str(path)) from error
    if not head:
        raise InputError("the file is empty", place=str(path))
    if head.startswith(b"GGUF"):
        return RecognisedPath(path, "gguf", "a GGUF file")
    if is_yaml(path):
        return _yaml(path, head)
    if path.name.startswith("tekken") and path.suffix == ".json":
        return RecognisedPath(path, "tokenizer", "a tokenizer file (Tekken)")
    if ".model" in path.suffixes:
        return RecognisedPath(path, "tokenizer", "a tokenizer file (SentencePiece)")
    if title := _model_file(path, head):
        return RecognisedPath(path, "gguf", title)
    if path.suffix == ".py":
        step = f"If it encodes rows, judge them: mistral-lora check --runner {shlex.quote(str(path))} --tokenizer PATH"
        raise _unknown(path, f"{step} --dataset rows.jsonl")
    container = container_of(head, path)
    if container == Container(VALUES) or (path.suffix == ".json" and container == Container(LINES)):
        return _json(path, container)
    if container == Container(LINES):
        return _lines(path)
    return _converted(path)


def makes_a_model(path: Path) -> bool:
    """Return whether a file is one by which a server makes a model: it names a GGUF file, and is none."""
    try:
        with opened(path) as file:
            head = file.read(_HEAD)
    except OSError:
        return False
    return not head.startswith(b"GGUF") and bool(_model_file(path, head))


def _model_file(path: Path, head: bytes) -> str:
    """Return the title of a file by which a server makes a model; empty if it is none."""
    from pytest_mistral_lora.programs.model_files import model_file

    return model_file(path.name, head.decode("utf-8", "replace"))


def _lines(path: Path) -> RecognisedPath:
    """Recognise the lines of a file by those that can be read.

    Raises:
        InputError: If none of the first lines is a row: a name such as `rows.jsonl` is not enough to judge the file.
    """
    from pytest_mistral_lora.formats.sources import is_row

    records = [record for record in first_values(path) if isinstance(record, Mapping | list)]
    known = next((record for record in records if recognise(record) is not None), None)
    found = recognise(known)
    if key := next(filter(None, map(ids_key, records)), ""):
        return RecognisedPath(path, "encoded", f"encoded rows (JSON Lines with {key})")
    if found is not None and is_row(known):
        return RecognisedPath(path, "rows", f"rows (JSON Lines, {found.evidence})")
    if found is not None:
        return _converted(path)
    if path.suffix in ROW_SUFFIXES:
        raise _no_rows(path)
    raise _unknown(path, keys=next((record for record in records if isinstance(record, Mapping)), None))


def _no_rows(path: Path) -> InputError:
    """Return the error for a file that is named like rows, with the fault of its first line."""
    from pytest_mistral_lora.chat.row_files import scan_records

    fault = next((item for item in scan_records(path) if isinstance(item, MistralLoraError)), None)
    if fault is None:
        return InputError("the file has no rows", place=str(path), expected="JSON Lines with messages")
    found = f"none of its first lines is a row: {fault.found}"
    return InputError(found, place=fault.place, expected=fault.expected, next_step=fault.next_step)


def _converted(path: Path) -> RecognisedPath:
    """Recognise encoded rows, or rows in another format, by the first records.

    Raises:
        InputError: If the format cannot be converted.
    """
    from pytest_mistral_lora.formats.convert import Source, layout_of
    from pytest_mistral_lora.formats.records import first_records

    container, first = first_records(path)
    if not first:
        raise InputError("the file has no rows", place=str(path))
    if key := next((key for record in first if (key := ids_key(record.value))), ""):
        return RecognisedPath(path, "encoded", f"encoded rows ({container} with {key})")
    try:
        _, evidence = layout_of(Source(path), first)
    except InputError as error:
        if "--format" not in error.next_step:
            raise
        # an option of the import
        step = f"{import_step(str(path))} --format NAME"
        raise InputError(error.found, place=error.place, expected=error.expected, next_step=step) from error
    return RecognisedPath(path, "rows", f"rows ({container}, {evidence}), converted")


def paths_in(text: str, folder: Path = Path()) -> list[Path]:
    """Return the paths that a word names: itself, and both sides of `NAME=PATH`, if they exist.

    Args:
        text: The word.
        folder: The folder where relative paths start.
    """
    name, _, value = text.partition("=")
    return [
        folder / candidate
        for candidate in dict.fromkeys((text, name, value))
        if candidate and os.path.lexists(folder / candidate)
    ]


def paths_behind(path: Path) -> list[Path]:
    """Return a path, and the paths that it names: base, data and output of a recipe, or a configuration's data."""
    from pytest_mistral_lora.formats.layouts import Layout
    from pytest_mistral_lora.formats.sources import sources_of
    from pytest_mistral_lora.training.recipe import load_recipe

    found = [path]
    if not may_declare(path):
        return found
    # a file with a fault names nothing here; the command reports the fault
    with suppress(MistralLoraError, OSError):
        recipe = load_recipe(path)
        return [path, *recipe.data_paths, *([recipe.base.path] if recipe.base.path else []), recipe.output]
    with suppress(MistralLoraError, OSError):
        found += [source.path for source in sources_of(path, Layout(), [])[0]]
    return found


def _json(path: Path, container: Container) -> RecognisedPath:
    """Recognise a JSON file of one object."""
    of_rows = _lines if container == Container(LINES) else _converted
    if path.stat().st_size > JSON_LIMIT:
        return of_rows(path)
    try:
        data = read_json(path)
    except InputError:
        # several objects, or a file of rows with a fault
        return of_rows(path)
    if isinstance(data, Mapping):
        if answer := trainer_answer(path, data):
            raise _of_trainer(path, *answer)
        if recognise(data) is not None:
            return of_rows(path)
    raise _unknown(path, keys=data)


def _yaml(path: Path, content: bytes) -> RecognisedPath:
    """Recognise a YAML file, or rows in a file that is only named like one.

    Args:
        path: The file.
        content: Its first `_YAML_BYTES` bytes.

    Raises:
        RecipeError: If it is neither YAML nor rows; with the line, before any slow import.
        InputError: If it is the file of another tool, or nothing that is checked.
    """
    import yaml

    from pytest_mistral_lora.chat.reading.plain_yaml import PlainLoader

    try:
        # a larger file is not a recipe, and its check refuses it
        data = yaml.load(content[: _YAML_BYTES - 1], Loader=PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        with suppress(InputError):
            if container_of(content[:_HEAD], path) == Container(LINES):
                return _lines(path)
        from pytest_mistral_lora.training.recipe import load_recipe

        load_recipe(path, content)
        raise _unknown(path) from error
    if isinstance(data, Mapping):
        known_keys = _RECIPE_KEYS & data.keys()
        if not {"base", "training"} <= known_keys and (answer := trainer_answer(path, data)):
            raise _of_trainer(path, *answer)
        if len(known_keys) > 1 or known_keys == data.keys():
            keys = ", ".join(key for key in data if key in known_keys)
            return RecognisedPath(path, "recipe", f"a recipe ({keys})", content)
        if recognise(data) is not None and container_of(content[:_HEAD], path) == Container(LINES):
            return _lines(path)
    raise _unknown(path, keys=data)


def _of_trainer(path: Path, title: str, step: str) -> InputError:
    """Return the error for a trainer's configuration, with the commands that judge and convert the rows of it."""
    command = f"{_CHECK} {shlex.quote(str(path))} --as rows --tokenizer PATH"
    step = f"{step}. Judge its data without converting it: {command}"
    return InputError(f"this is {title}", place=str(path), next_step=step)


def _unknown(path: Path, step: str = "", *, keys: Any = None) -> InputError:
    """Return the error for a path that cannot be checked."""
    found = "there is nothing here that is checked"
    if isinstance(keys, Mapping) and keys:
        found += f": it has the keys {', '.join(map(str, list(keys)[:8]))}"
    return InputError(
        found,
        place=str(path),
        expected="one of these: " + "; ".join(KINDS.values()),
        next_step=step or f"If it is one of them, name its kind: --as {'|'.join(KINDS)}",
    )
