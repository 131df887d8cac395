"""The tokenizer that a word names: a path, a shipped tokenizer, a Hub repository at a commit, or a recipe."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.chat.reading import similar_path
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.places import NOWHERE

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe

_AT_THE_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")


def tokenizer_path(text: str) -> Path:
    """Return the tokenizer that a word names, as a path.

    Args:
        text: A path; or the name of a tokenizer that mistral-common ships; or a repository of the Hub at a commit, as
            `owner/name@commit`, whose tokenizer files are fetched unless they are in the cache.

    Raises:
        PinError: If the repository's files cannot be found or fetched.
    """
    path = Path(text)
    # a path first: a folder named spm-v3 is the user's own tokenizer, and a path costs no import
    if path.exists():
        return path
    from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer

    if text in SHIPPED:
        return shipped_tokenizer(text)
    repository = _AT_THE_HUB.fullmatch(text)
    # without a commit it may be a missing path: the caller reports it
    if repository is None or repository["revision"] is None:
        return path
    from pytest_mistral_lora.checkpoint.pins import resolve

    return resolve(repository["repo"], repository["revision"], weights=False)


def require_there(path: Path) -> Path:
    """Return the path of a tokenizer, unless it looks like a repository without a commit.

    Raises:
        InputError: If the name could be a repository's; with the way to name it.
    """
    if not path.exists() and _AT_THE_HUB.fullmatch(str(path)) and not path.parent.exists():
        raise InputError(
            f"no such file or folder{similar_path(path)}, and the name of a repository of the Hub needs its commit",
            place=str(path),
            expected=f"{path}@COMMIT",
            next_step=f"Print the commit: mistral-lora pin {shlex.quote(str(path))}",
        )
    return path


def named_tokenizer(path: Path, oracle: str | None = None) -> tuple[Path, str | None, Recipe | None]:
    """Return the tokenizer that a path names, its declared oracle, and the recipe if the path is one.

    Args:
        path: The result of `tokenizer_path`; a recipe names the tokenizer of its base.
        oracle: The oracle that the user declares; None for the recipe's.

    Raises:
        InputError: If a repository has no commit.
        RecipeError: If the recipe has a fault.
        PinError: If the files of its base cannot be found or fetched.
    """
    recipe = recipe_at(path)
    if recipe is None:
        return require_there(path), oracle, None
    return base_of(recipe), oracle or recipe.base.oracle, recipe


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
        PinError: If the files of a base on the Hub cannot be found or fetched.
    """
    from pytest_mistral_lora.checkpoint.pins import resolve

    base = recipe.base
    return base.path or resolve(
        str(base.repo), str(base.revision), weights=False, place=NOWHERE.within("base", "revision")
    )
