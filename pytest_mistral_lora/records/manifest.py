"""`manifest.json`: the record of a run, checked against its JSON Schema (`manifest.schema.json`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import read_json
from pytest_mistral_lora.checkpoint.hub_cache import COMMIT
from pytest_mistral_lora.checkpoint.pins import check_revision
from pytest_mistral_lora.errors import PinError
from pytest_mistral_lora.records.files import inside, json_text, sha256_bytes
from pytest_mistral_lora.records.schema import RecordSchema, Violation, require_valid

MANIFEST = "manifest.json"
VERSION = 2
SCHEMA = RecordSchema(Path(__file__).with_name("manifest.schema.json"), body=("$defs", "body"))

# The seal is the hash of the file with this text in its place: of the file itself, no hash can be inside it.
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
        return [name for name in parts() if name not in self.data]


def parts() -> Mapping[str, Any]:
    """Return the schema of each part of a manifest, by its key at the top."""
    found: Mapping[str, Any] = SCHEMA.data["$defs"]["body"]["properties"]
    return found


def violations(data: Any) -> list[Violation]:
    """Return the violations of a manifest, in path order; empty for a valid one."""
    found = SCHEMA.violations(data)
    revision = data.get("revision") if isinstance(data, dict) else None
    if isinstance(revision, str) and COMMIT.fullmatch(revision):
        try:
            check_revision(revision)
        except PinError as error:  # it has the form of a commit, and cannot be one
            found.append(Violation("$.revision", error.found, "the commit of the base"))
    return sorted(found, key=lambda one: (one.path, one.expected))


def validate(data: Any, *, place: str = MANIFEST) -> Manifest:
    """Return `data` as a manifest under the names of the newest version; parts that it did not record stay absent.

    Raises:
        InputError: If it is not one; every violation is listed with its JSON path.
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
    return validate(read_json(path), place=str(path))


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
    """Return the data with its seal as the last key; it holds for the bytes that `files.write_json` writes."""
    blank = {**{name: value for name, value in data.items() if name != "seal"}, "seal": _UNSEALED}
    return {**blank, "seal": sha256_bytes(json_text(blank).encode())}


def seal_of(content: bytes, seal: str) -> str:
    """Return the seal that a manifest ought to have.

    Args:
        content: The bytes of the manifest's file.
        seal: The seal that it has.
    """
    # the last one: the same digits may stand in another value
    before, _, after = content.rpartition(seal.encode())
    return sha256_bytes(before + _UNSEALED.encode() + after)
