"""`manifest.json`: the record of a run, checked by its JSON Schema; the data files and the commit that it names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.objective import ANSWERS, Objective
from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.chat.reading.chunks import DataFile
from pytest_mistral_lora.checkpoint.hashes import sha256_bytes
from pytest_mistral_lora.checkpoint.hub_cache import COMMIT
from pytest_mistral_lora.checkpoint.pins import check_revision
from pytest_mistral_lora.errors import PinError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.files import inside, json_text
from pytest_mistral_lora.records.schema import RECORD, RecordSchema, Violation, require_valid

MANIFEST = "manifest.json"
DEPLOYMENT = "deployment"
NOTES_RECORD = "notes"
"""The part with the version that wrote the notes, and with their hashes in the record of the run."""

DECLARED = (DEPLOYMENT, NOTES_RECORD)
"""Parts that are no record of the run: they may change after it. See `records.deployment`."""

VERSION = 3
SCHEMA = RecordSchema(Path(__file__).with_name("manifest.schema.json"), body=("$defs", "body"))

_MARKS = frozenset({"base", "revision", "base_weights_sha256", "dataset_sha256", "seed", "masking", "lora", "seal"})

# The seal is the hash of the file with this text in its place, since a file cannot hold its own hash.
_UNSEALED = "0" * 64


@dataclass(frozen=True)
class Manifest:
    """A valid manifest.

    Attributes:
        data: Its content, under the names of the newest schema version.
        version: The schema version it was written in.
    """

    data: Mapping[str, Any]
    version: int

    @property
    def not_recorded(self) -> list[str]:
        """Names of the parts that this manifest does not have, in schema order: they cannot be checked."""
        return [name for name in parts() if name not in self.data and name not in DECLARED]


def parts() -> Mapping[str, Any]:
    """Return the schema of each part of a manifest, by its key at the top."""
    found: Mapping[str, Any] = SCHEMA.data["$defs"]["body"]["properties"]
    return found


def is_foreign(data: Any) -> bool:
    """Return whether a JSON value is the manifest of another tool, whose files may have the same name."""
    if not isinstance(data, dict) or not data or data.get("kind") in ("adapter", "merged"):
        return False
    # a single key, such as `revision`, proves nothing; a manifest of ours that lost a key has the others
    return len(_MARKS & data.keys()) < 2


def violations(data: Any) -> list[Violation]:
    """Return the violations of a manifest, in path order; empty for a valid one."""
    found = SCHEMA.violations(data)
    revision = data.get("revision") if isinstance(data, dict) else None
    if isinstance(revision, str) and COMMIT.fullmatch(revision):
        try:
            check_revision(revision)
        except PinError as error:  # the form of a commit, but not a possible one
            found.append(Violation(RECORD / "revision", error.found, "the commit of the base"))
    return sorted(found, key=lambda violation: (violation.place.order, violation.expected))


_PLACE = Place.of(MANIFEST)


def validate(data: Any, *, place: Place = _PLACE) -> Manifest:
    """Return `data` as a manifest under the names of the newest version; parts that it did not record stay absent.

    Raises:
        InputError: If it is not a valid manifest; every violation is listed with its JSON path.
    """
    require_valid(violations(data), "manifest", place)
    return Manifest({"kind": "adapter", **data, "schema_version": VERSION}, data.get("schema_version", 0))


def load(path: Path) -> Manifest:
    """Read the manifest of a folder, or a manifest file.

    Raises:
        InputError: If it cannot be read or is not a manifest.
    """
    if not path.is_file():
        path = inside(path, MANIFEST)
    return validate(read_json(path), place=Place.of(path))


def build(**known: Any) -> dict[str, Any]:
    """Return the manifest made of these parts, keys in schema order, sealed.

    Raises:
        InputError: If the parts do not make a manifest.
    """
    known = {"schema_version": VERSION, **known}
    data = {name: known[name] for name in [*parts(), *(key for key in known if key not in parts())] if name in known}
    data = sealed(data)
    validate(data)
    return data


def sealed(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data with its seal as the last key, valid for the bytes that `files.write_json` writes."""
    blank = {**{name: value for name, value in data.items() if name != "seal"}, "seal": _UNSEALED}
    return {**blank, "seal": sha256_bytes(json_text(blank).encode())}


def seal_of(content: bytes, seal: str) -> str:
    """Return the seal that a manifest ought to have.

    Args:
        content: The bytes of the manifest's file.
        seal: The seal that it has.
    """
    # the last occurrence: another value may have the same digits
    before, _, after = content.rpartition(seal.encode())
    return sha256_bytes(before + _UNSEALED.encode() + after)


Opener = Callable[[Path, Mapping[str, Any]], DataFile]
"""Opens a file by its entry in the manifest's `dataset`: `formats.sources.recorded_file`."""


def training_files(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> list[Path]:
    """Return the training files in recipe order, from the given files or the given folder."""
    if not isinstance(dataset, Path):
        return list(dataset)
    if not dataset.is_dir() or "dataset" not in data:
        return [dataset]
    return listed_files(dataset, data["dataset"]["files"])


def held_files(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> list[Path] | None:
    """Return the held-out files of the given folder; None if no folder was given."""
    return _named_files(data["dataset"]["eval_files"], dataset)


def retention_files(data: Mapping[str, Any], dataset: Path | Sequence[Path]) -> list[Path] | None:
    """Return the files of other subjects of the given folder; None if no folder was given."""
    return _named_files(data["dataset"].get("retention", {}).get("files", ()), dataset)


def _named_files(entries: Sequence[Mapping[str, Any]], dataset: Path | Sequence[Path]) -> list[Path] | None:
    if not entries:
        return []
    return listed_files(dataset, entries) if isinstance(dataset, Path) and dataset.is_dir() else None


def listed_files(folder: Path, entries: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Return the files of a folder: at their paths below the recipe's folder, or all directly in it."""
    found = []
    for entry in entries:
        path = folder / entry["path"]
        with suppress(OSError):  # a name in a manifest may be too long for a path
            path = path if path.is_file() else folder / path.name
        found.append(path)
    return found


def open_data_files(
    data: Mapping[str, Any], paths: Sequence[Path], entries: Sequence[Mapping[str, Any]], open_file: Opener | None
) -> list[DataFile]:
    """Return files for reading, each converted as its entry records; a file without an entry holds rows.

    Args:
        data: The manifest, which has the objective of entries without one.
        paths: The files.
        entries: Their entries.
        open_file: Opens a converted file; None if none is converted.
    """
    files = []
    of_run = data.get("masking", {}).get("objective", str(ANSWERS))
    for index, path in enumerate(paths):
        entry = entries[index] if index < len(entries) else {}
        file = DataFile(path) if open_file is None else open_file(path, entry)
        objective = Objective.of(entry.get("objective", of_run), Place.of(MANIFEST).within("masking", "objective"))
        files.append(replace(file, objective=objective))
    return files
