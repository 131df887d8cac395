"""Facts about the folder of a manifest: its files and no others, the manifest itself, tokenizer and template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pytest_mistral_lora import __version__
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.hashing import sha256_bytes, sha256_file
from pytest_mistral_lora.records.manifest import MANIFEST, load, seal_of
from pytest_mistral_lora.records.notes import NOTES, note_bytes, note_texts, noted_by
from pytest_mistral_lora.records.verify.field_checks import adapter_facts, base_facts, dataset_facts, parent_facts
from pytest_mistral_lora.records.verify.recompute import PROBES, Fact, State, absent, backend_of, computed, probe_sha256

_NOT_OF_A_RUN = (".git", ".gitattributes", ".cache")
"""What Git and the Hub put into a folder; no library loads anything from there."""


def folder_facts(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    """Yield what the manifest says of the folder that it is in."""
    yield from _seal(folder, data)
    yield from _files(folder, data)
    yield from _unlisted(folder, data)
    yield from _notes(folder, data)
    yield from _tokenizer(folder, data)
    yield from _template(folder, data)


def _seal(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    if "seal" in data:
        file = folder / MANIFEST
        yield computed("seal", data["seal"], lambda: seal_of(inside(folder, MANIFEST), data["seal"]), file)


def _files(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    for name, entry in data.get("files", {}).items():
        yield computed(f"files.{name}.sha256", entry["sha256"], partial(_digest, folder, name), folder / name)
        yield computed(f"files.{name}.size", entry["size"], partial(_size, folder, name), folder / name)


def _unlisted(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    if "files" not in data:
        return
    listed = {MANIFEST, *data["files"]}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        is_file = not path.is_dir() or path.is_symlink()
        if is_file and name.as_posix() not in listed and name.parts[0] not in _NOT_OF_A_RUN:
            yield Fact(f"files.{name.as_posix()}", "mismatch", None, "is not listed", str(path))


def _notes(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    """Yield whether the notes that are listed say what the manifest says, so that no value is changed in one alone."""
    made_by = noted_by(data)
    for name, text in note_texts(data).items():
        if name not in data.get("files", {}):
            continue
        fact, recorded = f"files.{name}.text", data["files"][name]["sha256"]
        if made_by == __version__:
            yield computed(fact, recorded, partial(sha256_bytes, text.encode()), folder / MANIFEST)
        else:
            yield absent(fact, recorded, f"made by version {made_by}; this is {__version__}")


def _tokenizer(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    recorded = data.get("tokenizer", {})
    if not recorded:
        return
    digests = [("sha256", recorded["file"], recorded["sha256"])]
    digests += [(f"files.{name}", name, digest) for name, digest in recorded.get("files", {}).items()]
    for key, name, digest in digests:
        yield computed(f"tokenizer.{key}", digest, partial(_sha256, folder, name), folder / name)
    if recorded["backend"] == "mistral-common":
        file = folder / recorded["file"]
        for key in ("version", "vocab_size"):
            yield computed(f"tokenizer.{key}", recorded[key], partial(_of_oracle, folder, recorded["file"], key), file)


def _of_oracle(folder: Path, name: str, key: str) -> Any:
    from pytest_mistral_lora.chat.oracle.mistral_common import Oracle

    return getattr(Oracle(inside(folder, name)), key)


def _template(folder: Path, data: Mapping[str, Any]) -> Iterator[Fact]:
    if "template" not in data:
        return
    recorded = data["template"]
    file = folder / recorded["file"]
    yield computed("template.sha256", recorded["sha256"], partial(_sha256, folder, recorded["file"]), file)
    if "probe_sha256" in recorded:
        yield _probe(folder, data)


def _probe(folder: Path, data: Mapping[str, Any]) -> Fact:
    name, recorded = "template.probe_sha256", data["template"]["probe_sha256"]
    probe = data["template"]["probe"]
    if probe not in PROBES:
        return absent(name, recorded, f"this version has no probe {probe!r}")
    place = folder / data["tokenizer"]["file"]
    return computed(name, recorded, lambda: probe_sha256(backend_of(folder, data), probe), place)


def _digest(folder: Path, name: str) -> str:
    return sha256_bytes(note_bytes(folder, name)) if name in NOTES else _sha256(folder, name)


def _size(folder: Path, name: str) -> int:
    return len(note_bytes(folder, name)) if name in NOTES else inside(folder, name).stat().st_size


def _sha256(folder: Path, name: str) -> str:
    return sha256_file(inside(folder, name))


__all__ = ["Fact", "State", "verify"]


def verify(
    folder: Path,
    *,
    base: Path | None = None,
    base_missing: str = "no base given",
    dataset: Path | Sequence[Path] | None = None,
    parent: Path | None = None,
) -> list[Fact]:
    """Compute again every fact of a folder's manifest that can be.

    Args:
        folder: An adapter or merged folder with `manifest.json`.
        base: The base checkpoint folder; without it, facts about the base are not available.
        base_missing: Why there is no base.
        dataset: The training files in recipe order, or a folder that holds them; without it, facts about the rows are
            not available.
        parent: The adapter that a merged folder was made of; without it, facts about it are not available.

    Raises:
        InputError: If there is no valid manifest.
    """
    data = load(folder).data
    facts = [*folder_facts(folder, data), *base_facts(data, base, base_missing), *parent_facts(data, parent)]
    if data["kind"] == "adapter":
        facts += adapter_facts(folder, data)
    return [*facts, *dataset_facts(folder, data, dataset)]
