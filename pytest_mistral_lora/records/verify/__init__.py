"""Compute again what a manifest records: match, mismatch or not available for each fact, never two states only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pytest_mistral_lora.records.manifest import load
from pytest_mistral_lora.records.verify.adapter import adapter_facts
from pytest_mistral_lora.records.verify.base import base_facts
from pytest_mistral_lora.records.verify.dataset import dataset_facts
from pytest_mistral_lora.records.verify.facts import Fact, State
from pytest_mistral_lora.records.verify.folder import folder_facts
from pytest_mistral_lora.records.verify.parent import parent_facts

__all__ = ["Fact", "State", "verify"]


def verify(
    folder: Path,
    *,
    base: Path | None = None,
    dataset: Path | Sequence[Path] | None = None,
    parent: Path | None = None,
) -> list[Fact]:
    """Compute again every fact of a folder's manifest that can be.

    Args:
        folder: An adapter or merged folder with `manifest.json`.
        base: The base checkpoint folder; without it, facts about the base are not available.
        dataset: The training files in recipe order, or a folder that holds them; without it, facts about the rows are
            not available.
        parent: The adapter that a merged folder was made of; without it, facts about it are not available.

    Raises:
        InputError: If there is no valid manifest.
    """
    data = load(folder).data
    facts = [*folder_facts(folder, data), *base_facts(data, base), *parent_facts(data, parent)]
    if data["kind"] == "adapter":
        facts += adapter_facts(folder, data)
    return [*facts, *dataset_facts(folder, data, dataset)]
