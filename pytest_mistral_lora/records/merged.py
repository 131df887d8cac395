"""Merged models: how one is told from an adapter, and how far one may be from base and adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import read_json
from pytest_mistral_lora.records.manifest import MANIFEST

FARTHEST: Mapping[str, float] = {"float32": 1e-2, "bfloat16": 1.0, "float16": 1.0}
"""Largest difference of a logit that rounding explains, by the dtype of the merged weights; merges of real weights were
seen to give 1e-4 in float32, and 0.2 in bfloat16 with sums in float32."""


def is_merged(folder: Path) -> bool:
    """Say whether a folder's manifest calls it a merged model; not, where there is no manifest that can be read."""
    try:
        data = read_json(folder / MANIFEST)
    except InputError:
        return False
    return isinstance(data, dict) and data.get("kind") == "merged"


def require_adapter(folder: Path) -> None:
    """Refuse a merged model where an adapter is expected.

    Raises:
        InputError: If the folder's manifest says that it is one.
    """
    if is_merged(folder):
        raise InputError(
            "a merged model (kind merged in its manifest.json): its adapter is in the weights already",
            place=str(folder),
            expected="the folder of an adapter",
            next_step="Name the folder that it was merged from.",
        )
