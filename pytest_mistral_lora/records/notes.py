"""`DECISION.md` and `README.md`: made from the manifest, but for a part that is the author's and is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.card import CARD, card_text
from pytest_mistral_lora.records.decision import DECISION, decision_text
from pytest_mistral_lora.records.files import inside, write_text
from pytest_mistral_lora.records.hashing import sha256_bytes
from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.own_part import own_part, with_own_part

NOTES = (DECISION, CARD)
_NEEDED = ("tokenizer", "template", "dataset", "masking", "lora", "training", "environment", "evaluation")


def note_texts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the notes of a folder by file name, with nothing in the author's part.

    Args:
        manifest: The folder's manifest; `files` and `seal` are not used. One that does not record enough gives none.
    """
    if any(part not in manifest for part in _NEEDED):
        return {}
    return {DECISION: decision_text(manifest), CARD: card_text(manifest)}


def noted_by(manifest: Mapping[str, Any]) -> str | None:
    """Return the version of this package that made the notes: in the run, or in the merge of a merged model."""
    environment = (manifest.get("parent") or manifest).get("environment", {})
    version: str | None = environment.get("packages", {}).get("pytest-mistral-lora")
    return version


def note_bytes(folder: Path, name: str) -> bytes:
    """Return a note as it is with nothing in the author's part: what the manifest lists of it.

    Raises:
        InputError: If it cannot be read.
    """
    return with_own_part(_read(folder, name), "").encode()


def write_notes(folder: Path) -> list[Path]:
    """Make the notes of a finished folder again, keep what its author wrote, and return their files.

    Raises:
        InputError: If there is no valid manifest, it lists no notes, or this version would write other texts.
    """
    manifest = load(folder).data
    listed = {name: manifest.get("files", {}).get(name) for name in NOTES}
    texts = note_texts(manifest)
    for name, text in texts.items():
        if listed[name] is None or sha256_bytes(text.encode()) != listed[name]["sha256"]:
            made = noted_by(manifest) or "another version"
            raise InputError(
                "this version writes another text than the manifest lists" if listed[name] else "is not listed",
                place=str(folder / name),
                next_step=f"Use the version that made the folder: {made}.",
            )
    for name, text in texts.items():
        kept = own_part(_read(folder, name)) if (folder / name).exists() else ""
        write_text(folder / name, with_own_part(text, kept))
    return [folder / name for name in texts]


def _read(folder: Path, name: str) -> str:
    try:
        return inside(folder, name).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", place=str(folder / name)) from error
