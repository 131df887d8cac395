"""Runs on many rows for the tests: a recipe whose base is nothing but its tokenizer, and rows of varied length."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from converted import converted_tokenizer

from pytest_mistral_lora.checkpoint.encoder import Encoder, make_encoder
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.rows.loading import RunData, load_data

ROWS = 600
"""Rows in the folder of the fixture `rows_folder`."""


def said(text: str, answer: str, **assistant: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer, **assistant}]}


def numbered(number: int) -> list[dict[str, Any]]:
    return [said(f"Question {index}?", "word " * (index % 7) + f"Answer {index}.") for index in range(number)]


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def recipe_of(folder: Path, *, backend: str = "mistral-common", data: Any = None, **training: Any) -> Recipe:
    recipe = {
        "base": {"repo": "a/b", "revision": "1" * 40},
        "backend": backend,
        "data": {"train": ["rows.jsonl"], **(data or {})},
        "training": {"steps": 1, **training},
        "output": "out",
    }
    return parse_recipe(recipe, folder=folder)


def encoder_of(backend: str = "mistral-common", tokenizer: str = "spm-v3") -> Encoder:
    return make_encoder(backend, converted_tokenizer(tokenizer))


def load(folder: Path, encoder: Encoder | None = None, **keys: Any) -> RunData:
    return load_data(recipe_of(folder, **keys), encoder or encoder_of(), processes=1)


def kept(folder: Path) -> dict[str, int]:
    """Return the folders of the cache, and what changes when one is made anew."""
    return {one.name: one.stat().st_mtime_ns for one in (folder / "cache").iterdir() if one.is_dir()}
