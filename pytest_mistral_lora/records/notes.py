"""The notes of a run folder, `DECISION.md` and the model card `README.md`: generated from the manifest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.decision_note import (
    DECISION,
    author_section,
    decision_text,
    empty_author_section,
    with_author_section,
)
from pytest_mistral_lora.records.files import inside, write_text
from pytest_mistral_lora.records.hashing import sha256_bytes
from pytest_mistral_lora.records.manifest import load

CARD = "README.md"


def card_text(manifest: Mapping[str, Any]) -> str:
    """Return the model card of an adapter or a merged model.

    The front matter has the Hub's keys (https://huggingface.co/docs/hub/model-cards#model-card-metadata); the keys of
    the recipe's `card` come after them.
    """
    tokenizer = manifest["tokenizer"]
    facts = (
        f"Prompts are those of `{tokenizer['file']}` ({tokenizer['version'] or tokenizer['backend']}), in this "
        "folder. [DECISION.md](DECISION.md) records the data, the settings and how to reproduce the run; "
        "`manifest.json` has every hash, and `mistral-lora verify .` recomputes them."
    )
    front = f"---\n{_metadata(manifest)}---"
    return "\n\n".join([front, _title(manifest), empty_author_section(), _use(manifest), facts]) + "\n"


def _metadata(manifest: Mapping[str, Any]) -> str:
    merged = manifest["kind"] == "merged"
    known = {
        "base_model": _hub_id(manifest["base"]),
        "base_model_relation": "finetune" if merged else "adapter",
        "datasets": [_hub_id(entry["path"]) for entry in manifest.get("dataset", {}).get("files", ())],
        "library_name": "transformers" if merged else "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "mistral"],
    }
    own = manifest.get("recipe", {}).get("card", {})
    return yaml.safe_dump({**known, **own}, sort_keys=False, allow_unicode=True)


def _hub_id(name: str) -> str:
    """Return a name that the Hub accepts in metadata: it refuses a card with a path in it."""
    return name if re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) else PurePosixPath(name).name or "local"


def _title(manifest: Mapping[str, Any]) -> str:
    base = f"`{manifest['base']}`" + (f" at `{manifest['revision']}`" if manifest["revision"] else "")
    if manifest["kind"] == "merged":
        return (
            f"# {_hub_id(manifest['base'])}, fine-tuned and merged\n\nFull weights: {base} with a LoRA adapter merged "
            "into it. It is a model of its own: no adapter of the base is valid on it."
        )
    return f"# LoRA adapter of {_hub_id(manifest['base'])}\n\nAn adapter, not a model. It is valid on {base} only."


def _use(manifest: Mapping[str, Any]) -> str:
    if manifest["kind"] == "merged":
        return '## Use\n\n```python\nmodel = AutoModelForCausalLM.from_pretrained("this folder")\n```'
    pin = f', revision="{manifest["revision"]}"' if manifest["revision"] else ""
    return (
        f'## Use\n\n```python\nbase = AutoModelForCausalLM.from_pretrained("{manifest["base"]}"{pin})\n'
        'model = PeftModel.from_pretrained(base, "this folder")\n```'
    )


NOTES = (DECISION, CARD)
_NEEDED = ("tokenizer", "template", "dataset", "masking", "lora", "training", "environment", "evaluation")


def note_texts(manifest: Mapping[str, Any]) -> dict[str, str]:
    """Return the notes of a folder by file name, with an empty author's section.

    Args:
        manifest: The folder's manifest; `files` and `seal` are not used. One of version 0 records too little: no notes.
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
    """Return a note with an empty author's section: the bytes that the manifest lists.

    Raises:
        InputError: If it cannot be read.
    """
    return with_author_section(_read(folder, name), "").encode()


def write_notes(folder: Path) -> list[Path]:
    """Generate the notes of a finished folder again, keep the author's section, and return their files.

    Raises:
        InputError: If there is no valid manifest, it lists no notes, or this version would generate another text.
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
        kept = author_section(_read(folder, name)) if (folder / name).exists() else ""
        write_text(folder / name, with_author_section(text, kept))
    return [folder / name for name in texts]


def _read(folder: Path, name: str) -> str:
    try:
        return inside(folder, name).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", place=str(folder / name)) from error
