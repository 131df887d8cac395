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
    shipped, first = _shipped()
    literals = [*first, *(f"<SPECIAL_{number}>" for number in range(20, 32)), *markers]
    specials = [{"rank": rank, "token_str": literal, "is_control": True} for rank, literal in enumerate(literals)]
    config, vocabulary = {**shipped["config"], "version": version}, shipped["vocab"]
    if words:
        config["default_vocab_size"] = words + config["default_num_special_tokens"]
        vocabulary = vocabulary[:words]
    path = folder / "tekken.json"
    data = {**shipped, "config": config, "vocab": vocabulary, "special_tokens": specials, **keys}
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def write_cut(folder: Path, *, words: int = _WORDS) -> Path:
    """Write the shipped Tekken file of v3 with its first words alone, and return its path."""
    shipped, _ = _shipped()
    config = {**shipped["config"], "default_vocab_size": words + shipped["config"]["default_num_special_tokens"]}
    path = folder / "tekken.json"
    path.write_text(json.dumps({**shipped, "config": config, "vocab": shipped["vocab"][:words]}), encoding="utf-8")
    return path


def _shipped() -> tuple[dict[str, Any], list[str]]:
    """Read the shipped file, which would hold 50 MB if it were kept, and the first of its control tokens."""
    path = shipped_tokenizer("tekken-240718")
    return json.loads(path.read_text(encoding="utf-8")), [*Oracle(path).control_tokens.values()][:20]


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
