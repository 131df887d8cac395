"""Tekken files of the versions that mistral-common knows but does not ship, derived from a shipped vocabulary.

The vocabulary is real. `test_published_ids.py` compares ids that were recorded from published files of v7, v11 and v13,
those of `[ARGS]`, `[CALL_ID]`, `[THINK]` and `[/THINK]` among them; the ids of v15's settings are ours. By default the
vocabulary is cut off: versions differ in markers and layout alone, and 131,000 tokens take seconds at each conversion.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer

_CALLS = ("[ARGS]", "[CALL_ID]")
_THINKING = ("[THINK]", "[/THINK]")
_SETTINGS = ("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")
_WORDS = 8_000
_EFFORT = {"type": "enum", "values": ["none", "low", "high"], "accepts_none": True, "default": "none"}

DERIVED: Mapping[str, tuple[str, tuple[str, ...], Mapping[str, Any]]] = MappingProxyType(
    {
        "derived-v7": ("v7", (), {}),
        "derived-v11": ("v11", _CALLS, {}),
        "derived-v13": ("v13", _CALLS, {}),
        "derived-v13-thinking": ("v13", (*_CALLS, *_THINKING), {}),
        "derived-v15": (
            "v15",
            (*_CALLS, *_THINKING, *_SETTINGS),
            {"model_settings_builder": {"reasoning_effort": _EFFORT, "json_schema": None}},
        ),
        "derived-v15-schema": (
            "v15",
            (*_CALLS, *_THINKING, *_SETTINGS),
            {"model_settings_builder": {"reasoning_effort": _EFFORT, "json_schema": {"type": "json_schema"}}},
        ),
    }
)
"""Our name for each derived file: its version, the markers that it has more than v7, and other keys of the file."""


def write_derived(name: str, folder: Path, *, words: int = 0) -> Path:
    """Write the `tekken.json` of a derived tokenizer into a folder, and return its path.

    Args:
        name: Our name for it.
        folder: The folder.
        words: Ids of text, if it is to have only the first of them: it then loads at once.
    """
    version, markers, keys = DERIVED[name]
    shipped = _shipped(words)
    literals = [*_first_markers(), *(f"<SPECIAL_{number}>" for number in range(20, 32)), *markers]
    specials = [{"rank": rank, "token_str": literal, "is_control": True} for rank, literal in enumerate(literals)]
    config = {**shipped["config"], "version": version}
    if words:
        config["default_vocab_size"] = words + config["default_num_special_tokens"]
    path = folder / "tekken.json"
    data = {**shipped, "config": config, "special_tokens": specials, **keys}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def write_cut(folder: Path, *, words: int = _WORDS) -> Path:
    """Write the shipped Tekken file of v3 with its first words alone, and return its path."""
    shipped = _shipped(words)
    config = {**shipped["config"], "default_vocab_size": words + shipped["config"]["default_num_special_tokens"]}
    path = folder / "tekken.json"
    path.write_text(json.dumps({**shipped, "config": config}), encoding="utf-8")
    return path


def _shipped(words: int) -> dict[str, Any]:
    """Return the shipped file with its first words, or with all of them, which would hold 50 MB if they were kept."""
    shipped = _first_words() if 0 < words <= _WORDS else _read_shipped()
    return {**shipped, "vocab": shipped["vocab"][: words or None]}


def _read_shipped() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(shipped_tokenizer("tekken-240718").read_text(encoding="utf-8"))
    return read


@functools.cache
def _first_words() -> dict[str, Any]:
    shipped = _read_shipped()
    return {**shipped, "vocab": shipped["vocab"][:_WORDS]}


@functools.cache
def _first_markers() -> list[str]:
    """Return the first of the shipped file's control tokens, which have no names in it."""
    return [*Oracle(cut_tokenizer()).control_tokens.values()][:20]


@functools.cache
def cut_tokenizer() -> Path:
    """Return the path of the shipped Tekken file of v3 with its first words, written once for the whole run."""
    return write_cut(Path(tempfile.mkdtemp(prefix="tekken-cut-", dir=_folder().name)))


def tokenizer_named(name: str) -> Path:
    """Return the path of a tokenizer file by our name: shipped, derived or `tekken-cut`."""
    if name in DERIVED:
        return derived_tokenizer(name)
    return cut_tokenizer() if name == "tekken-cut" else shipped_tokenizer(name)


@functools.cache
def derived_tokenizer(name: str, *, words: int = _WORDS) -> Path:
    """Return the path of a derived `tekken.json`, written once for the whole run; 0 words are all of them."""
    return write_derived(name, Path(tempfile.mkdtemp(prefix=f"{name}-", dir=_folder().name)), words=words)


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="derived-tekken-")


@functools.cache
def derived_oracle(name: str, *, words: int = _WORDS) -> Oracle:
    """Return the oracle of a derived tokenizer, loaded once."""
    return Oracle(derived_tokenizer(name, words=words))
