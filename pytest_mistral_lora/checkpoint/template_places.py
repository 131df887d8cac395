"""The places where a folder can keep its chat templates, and what each of them says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pytest_mistral_lora.checkpoint.tokenizer_files import (
    MORE_TEMPLATES,
    OLD_TEMPLATE,
    PROCESSOR_CONFIG,
    TEMPLATE,
    TOKENIZER_CONFIG,
    TokenizerFiles,
)

KEY = "chat_template"


def template_places(files: TokenizerFiles) -> dict[str, dict[str, str]]:
    """Return each template's text by its name (`default`, `tool_use`, …) and by the place where it stands.

    A newline at the very end is left out: Jinja does so, too.
    """
    places: dict[str, dict[str, str]] = {}
    for name, place, text in _templates(files):
        places.setdefault(name, {})[place] = text.removesuffix("\n")
    return places


def _templates(files: TokenizerFiles) -> Iterator[tuple[str, str, str]]:
    for file in files.names:
        path = PurePosixPath(file)
        text = files.text(file) if path.suffix == ".jinja" else None
        if text is not None:
            yield (path.stem if path.parent.name == MORE_TEMPLATES else "default"), file, text
    for file in (TOKENIZER_CONFIG, OLD_TEMPLATE, PROCESSOR_CONFIG):
        for name, text in _of_key(files.json(file).get(KEY)):
            yield name, f"{file}, {KEY}", text


def _of_key(value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield "default", value
    elif isinstance(value, dict):
        yield from ((str(name), text) for name, text in value.items() if isinstance(text, str))
    elif isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict) and isinstance(entry.get("template"), str):
                yield str(entry.get("name", "default")), entry["template"]


def loaded_place(files: TokenizerFiles) -> str:
    """Return where the template that transformers loads stands; empty where there is none."""
    places = template_places(files).get("default", {})
    order = (TEMPLATE, f"{MORE_TEMPLATES}/default.jinja", f"{TOKENIZER_CONFIG}, {KEY}")
    return next((place for place in order if place in places), "")
