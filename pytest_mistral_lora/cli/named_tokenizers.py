"""The tokenizers that words of the command line name: by path, by shipped name, by recipe, or at the Hub."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.errors import InputError, PinError

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe

_AT_THE_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")


def tokenizer_path(text: str) -> Path:
    """Return the tokenizer that a word of the command line names, as a path.

    Args:
        text: A path; or the name of a tokenizer that mistral-common ships; or a repository of the Hub at a commit, as
            `owner/name@commit`, whose tokenizer files are fetched unless they are in the cache.

    Raises:
        argparse.ArgumentTypeError: If the repository's files cannot be had.
    """
    path = Path(text)
    # a path first: a folder named spm-v3 is the user's own tokenizer, and a path costs no import
    if path.exists():
        return path
    from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer

    if text in SHIPPED:
        return shipped_tokenizer(text)
    repository = _AT_THE_HUB.fullmatch(text)
    # without a commit it may be a path, which is not there: the verb reports that
    if repository is None or repository["revision"] is None:
        return path
    from pytest_mistral_lora.checkpoint.pins import resolve

    try:
        return resolve(repository["repo"], repository["revision"], weights=False)
    except PinError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def require_there(path: Path) -> Path:
    """Return the path of a tokenizer if there is one.

    Raises:
        InputError: If there is none; if the name could be that of a repository, with the way to name it.
    """
    if not path.exists() and _AT_THE_HUB.fullmatch(str(path)) and not path.parent.exists():
        raise InputError(
            "no such file or folder, and the name of a repository of the Hub needs its commit",
            place=str(path),
            expected=f"{path}@COMMIT",
            next_step=f"Print the commit: mistral-lora pin {shlex.quote(str(path))}",
        )
    return path


def recipe_at(path: Path) -> Recipe | None:
    """Return the recipe of a YAML file; None for any other path.

    Raises:
        RecipeError: If the recipe has a fault.
    """
    if path.suffix.lower() not in (".yaml", ".yml"):
        return None
    from pytest_mistral_lora.training.recipe import load_recipe

    return load_recipe(path)


def base_of(recipe: Recipe) -> Path:
    """Return the folder of a recipe's base, for its tokenizer: weights are neither fetched nor hashed.

    Raises:
        PinError: If the files of a base at the Hub cannot be had.
    """
    from pytest_mistral_lora.checkpoint.pins import resolve

    base = recipe.base
    return base.path or resolve(str(base.repo), str(base.revision), weights=False, place="base.revision")


def name_of(path: Path) -> str:
    """Return the name of a tokenizer for people: a shipped one's own, a repository with its commit, or the path."""
    from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
    from pytest_mistral_lora.checkpoint.hub_cache import snapshot_of

    if (snapshot := snapshot_of(path)) is not None:
        return "@".join(snapshot)
    return next((name for name in SHIPPED if shipped_tokenizer(name) == path), str(path))
