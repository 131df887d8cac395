"""`manifest.json`: what a run was made of, checked against its JSON Schema (`manifest.schema.json`)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.checkpoint.pins import check_revision
from pytest_mistral_lora.errors import InputError, PinError
from pytest_mistral_lora.records.files import json_text
from pytest_mistral_lora.records.hashing import sha256_bytes

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator

MANIFEST = "manifest.json"
VERSION = 2

_UNSEALED = "0" * 64


@dataclass(frozen=True)
class Violation:
    """One place where data is not a manifest.

    Attributes:
        path: JSON path of the value, `$.training.schedule.name`.
        found: The value, shortened; empty for a missing key.
        expected: What the schema asks for.
    """

    path: str
    found: str
    expected: str

    def __str__(self) -> str:
        """Return the violation as one line."""
        return f"{self.path}: {self.found or 'is missing'}; expected {self.expected}"


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


@cache
def schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a manifest."""
    text = (files(__package__) / "manifest.schema.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def parts() -> Mapping[str, Any]:
    """Return the schema of each part of a manifest, by its key at the top."""
    found: Mapping[str, Any] = schema()["$defs"]["body"]["properties"]
    return found


def violations(data: Any) -> list[Violation]:
    """Return every place where `data` is not a manifest, in path order; empty for a valid one."""
    found = [one for error in _validator().iter_errors(data) for one in _explain(error)]
    found += _made_up(data)
    return sorted(set(found), key=lambda one: (one.path, one.expected))


def _made_up(data: Any) -> list[Violation]:
    """Return the revision as a violation if it has the form of a commit and cannot be one."""
    revision = data.get("revision") if isinstance(data, dict) else None
    if not isinstance(revision, str) or not re.fullmatch("[0-9a-f]{40}", revision):
        return []
    try:
        check_revision(revision)
    except PinError as error:
        return [Violation("$.revision", error.found, "the commit of the base")]
    return []


def validate(data: Any, *, place: str = MANIFEST) -> Manifest:
    """Return `data` as a manifest.

    Raises:
        InputError: If it is not one; every violation is listed with its JSON path.
    """
    wrong = violations(data)
    if wrong:
        lines = [f"{len(wrong)} violation{'s' if len(wrong) != 1 else ''} of the manifest schema"]
        raise InputError("\n".join([*lines, *(f"  {one}" for one in wrong)]), place=place)
    version = data.get("schema_version", 0)
    return Manifest(_migrated(data), version)


def load(path: Path) -> Manifest:
    """Read the manifest of a folder, or a manifest file.

    Raises:
        InputError: If it cannot be read or is not a manifest.
    """
    file = path / MANIFEST if path.is_dir() else path
    return validate(read_json(file), place=str(file))


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
    """Return a manifest's data with its seal, as the last key: what `files.write_json` makes of it keeps the seal."""
    blank = {**{name: value for name, value in data.items() if name != "seal"}, "seal": _UNSEALED}
    return {**blank, "seal": sha256_bytes(json_text(blank).encode())}


def seal_of(file: Path, seal: str) -> str:
    """Return the seal that a manifest ought to have.

    Args:
        file: The manifest.
        seal: The seal that it has.
    """
    before, _, after = file.read_bytes().rpartition(seal.encode())
    return sha256_bytes(before + _UNSEALED.encode() + after)


def _migrated(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest of an older version under today's names; what it did not record stays absent."""
    return {"kind": "adapter", **data, "schema_version": VERSION}


@cache
def _validator() -> Draft202012Validator:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema())


def _explain(error: Any) -> Iterator[Violation]:
    """Put one `jsonschema.ValidationError` into our words; a missing or surplus key is named in the path."""
    path, asked = error.json_path, error.validator_value
    if error.validator == "required":
        for name in asked:
            if name not in error.instance:
                yield Violation(f"{path}.{name}", "", _description([*error.absolute_path, name]))
    elif error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        for name in error.instance:
            if name not in known and not name.startswith("x-"):
                yield Violation(f"{path}.{name}", _short(error.instance[name]), "no such key (your own begin with x-)")
    else:
        yield Violation(path, _short(error.instance), _asked(error.validator, asked, error.schema))


def _description(path: Sequence[str | int]) -> str:
    """Return what the schema says of the value at a path."""
    place: Mapping[str, Any] = schema()["$defs"]["body"]
    for step in path:
        inner = place.get("items") if isinstance(step, int) else place.get("properties", {}).get(step)
        place = _referred(inner or {})
    return str(place.get("description", "a value"))


def _referred(place: Mapping[str, Any]) -> Mapping[str, Any]:
    target: Mapping[str, Any] = schema()
    if "$ref" not in place:
        return place
    for name in place["$ref"].removeprefix("#/").split("/"):
        target = target[name]
    return {**target, **place}


def _asked(validator: str, asked: Any, place: Mapping[str, Any]) -> str:
    words = {
        "const": f"{asked!r}",
        "enum": f"one of {asked}",
        "pattern": str(place.get("description", f"text that matches {asked}")),
        "not": str(place.get("description", f"not {asked}")),
        "type": " or ".join([asked] if isinstance(asked, str) else asked) if validator == "type" else "",
        "minimum": f"at least {asked}",
        "exclusiveMinimum": f"above {asked}",
        "exclusiveMaximum": f"below {asked}",
    }
    return words.get(validator, f"{validator} {asked}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:77]}…"
