"""Write a manifest that was changed as a trainer would that had declared it so: with its notes, and sealed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pytest_mistral_lora.records.files import listing, write_json, write_text
from pytest_mistral_lora.records.manifest import MANIFEST, sealed, violations
from pytest_mistral_lora.records.notes import note_texts


def declare(folder: Path, data: Any) -> None:
    """Write this as a folder's manifest; what is no valid one is written as it is."""
    if not violations(data):
        files = dict(data.get("files", {}))
        for name, text in note_texts(data).items():
            if name in files and (folder / name).is_file():
                write_text(folder / name, text)
                files[name] = listing(folder)[name]
        data = sealed({**data, "files": files}) if "seal" in data else data
    write_json(folder / MANIFEST, data)
