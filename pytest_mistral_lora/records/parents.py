"""The adapters that an adapter goes on from, as its manifest records them: one after the other, the nearest first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OF_EACH = ("path", "manifest_sha256", "tensors_sha256", "dataset", "dataset_sha256", "steps")
"""What a manifest records of each adapter in the line."""


def facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an adapter's manifest tells of its run: `dataset`, `dataset_sha256`, `steps`, and its own `parents`.

    Args:
        manifest: The manifest; empty for an adapter of another trainer, whose run is not recorded.
    """
    files = manifest.get("dataset", {}).get("files")
    start = manifest.get("lora", {}).get("start")
    return {
        "dataset": None if files is None else [entry["path"] for entry in files],
        "dataset_sha256": manifest.get("dataset_sha256"),
        "steps": manifest.get("training", {}).get("steps"),
        "parents": [] if start is None else [{key: start[key] for key in OF_EACH}, *start["parents"]],
    }
