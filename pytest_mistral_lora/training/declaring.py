"""Declare again what production serves of a finished folder, and what the user's commands left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import InputError, shortened
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.records.base_location import recipe_folder
from pytest_mistral_lora.records.compare_runs import ABSENT, differences
from pytest_mistral_lora.records.deployment import commands_of, conflicts, hashed_files
from pytest_mistral_lora.records.manifest import DEPLOYMENT, MANIFEST, load
from pytest_mistral_lora.training.recipe.model import load_recipe

_MOST_NEIGHBOURS = 500
_SHOWN = 3


def recorded_declarations(folder: Path, *, withdraw: bool = False) -> dict[str, Any] | None:
    """Return what a folder declares, with the hashes of the commands' files as they are now; None without a change.

    Args:
        folder: The folder of an adapter or a merged model.
        withdraw: Whether production serves nothing of it any longer.

    Raises:
        InputError: If its manifest is missing or not valid.
    """
    data = load(folder).data
    home = recipe_folder(folder.resolve(), str(data.get("recipe", {}).get("output", "")))
    recorded = commands_of(data)
    commands = [{**entry, "files": hashed_files(home, [*entry["files"]])} for entry in recorded]
    if commands == recorded and not withdraw:
        return None
    deployment = {DEPLOYMENT: None if withdraw else data[DEPLOYMENT]} if withdraw or DEPLOYMENT in data else {}
    return {**deployment, "evaluation": commands}


def recipe_declarations(folder: Path, path: Path) -> dict[str, Any]:
    """Return what a recipe declares for the folder of its run, with the hashes of the commands' files.

    Args:
        folder: The folder of the adapter, or of a merged model of it.
        path: The recipe.

    Raises:
        RecipeError: If the recipe cannot be read.
        InputError: If the folder's manifest is missing or not valid, or the recipe is that of another run.
    """
    data, recipe = load(folder).data, load_recipe(path)
    changed = [*_changes(data.get("recipe", {}), recipe.as_written())]
    if changed:
        code = data["environment"].get("code")
        step = f"The recipe of the run is in its commit: git show {code['commit']}:./{path.name}" if code else ""
        more = f", and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise InputError(
            f"is not the recipe of {folder}: {'; '.join(changed[:_SHOWN])}{more}",
            place=Place.of(path),
            expected="the recipe of the run, with another deployment or other evaluation.commands",
            next_step=step,
        )
    declared = recipe.declared()
    for entry in declared["evaluation"]:
        entry["files"] = hashed_files(recipe.folder.resolve(), [*entry["files"]])
    return declared


def _changes(recorded: Mapping[str, Any], written: Mapping[str, Any]) -> Iterator[str]:
    """Yield each key in which a recipe differs from the recorded one, but for the place of its output."""
    # as the manifest has it: a tuple is a list
    now = json.loads(json.dumps(written))
    for path, before, after in differences((), dict(recorded), now):
        # a key that is not recorded is one of a newer version
        if path[0] == "output" or before is ABSENT:
            continue
        values = ["not set" if value is ABSENT else shortened(value) for value in (after, before)]
        yield f"{'.'.join(map(str, path))} is {values[0]}, and was {values[1]}"


def other_claims(folder: Path) -> list[tuple[Path, str]]:
    """Return the folders beside a folder that claim its name for another deployment, each with the difference."""
    beside = sorted(path for path in folder.absolute().parent.iterdir() if (path / MANIFEST).is_file())
    manifests: dict[Path, Mapping[str, Any]] = {}
    for path in beside[:_MOST_NEIGHBOURS]:
        try:
            manifests[path] = load(path).data
        except InputError:
            continue  # `check` reports it
    here = folder.absolute()
    found = [(set(pair), why) for *pair, why in conflicts(manifests) if here in pair]
    return [((pair - {here}).pop(), why) for pair, why in found]
