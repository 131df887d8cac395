"""`mistral-lora pin`: the commit of a branch, for a recipe."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.cli.verb import Verb
from pytest_mistral_lora.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import PinnedBase

_DESCRIPTION = """\
A branch can move to other weights, so a recipe names a commit. Print the commit that a branch or tag of a Hub
repository has now (`main`, unless you name another one), or write it into a recipe, in which nothing else changes. Of a
recipe with a local base, write the hash of its weights.

Offline, the commit that was last fetched into the cache is taken, and a note on stderr tells you so."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("base", metavar="BASE", help="Hub repository, OWNER/NAME or OWNER/NAME@BRANCH, or a recipe")
    parser.add_argument(
        "--branch",
        metavar="NAME",
        help="branch or tag (default: the one that the recipe names, or main); moves the pin of a pinned recipe",
    )


def run(args: argparse.Namespace) -> int:
    """Print the commit, or write it into the recipe and print its change.

    Raises:
        InputError: If BASE is neither a recipe nor the id of a repository.
    """
    from pytest_mistral_lora.checkpoint.pins import find_commit

    path = Path(args.base)
    if path.suffix.lower() in (".yaml", ".yml"):
        from pytest_mistral_lora.training.recipe import pin_recipe

        pinned = pin_recipe(path, args.branch)
        sys.stdout.write(f"{path}: {_change(pinned, path)}\n")
        if pinned.value != pinned.before:
            _note_source(pinned.source, pinned.name)
        return EXIT_OK
    repo, _, branch = args.base.partition("@")
    if repo.count("/") != 1 or (branch and args.branch) or path.exists():
        raise InputError(
            "--branch and a branch behind the @" if branch and args.branch else f"{args.base!r} is no repository",
            expected="OWNER/NAME, OWNER/NAME@BRANCH, or a recipe (*.yaml), whose base may be a local folder",
        )
    name = args.branch or branch or "main"
    found = find_commit(repo, name)
    sys.stdout.write(f"{found.commit}\n")
    _note_source(found.source, name)
    return EXIT_OK


def _change(pinned: PinnedBase, path: Path) -> str:
    if pinned.before == pinned.value:
        move = f". To move the pin: mistral-lora pin {shlex.quote(str(path))} --branch main"
        more = move if pinned.name == pinned.value else ""
        return f"{pinned.key} is {pinned.value} already{more}"
    before = f" (before: {pinned.before})" if pinned.before else ""
    return f"{pinned.key} is {pinned.value} now{before}"


def _note_source(source: str, name: str) -> None:
    if source == "cache":
        sys.stderr.write(f"note: the Hub cannot be reached; {name} was this commit when it was last fetched\n")
    elif source == "given" and name:
        sys.stderr.write("note: the Hub was not asked whether it has this commit\n")


VERB = Verb(
    "pin",
    "print the commit of a branch, or write it into a recipe",
    _add_options,
    run,
    description=_DESCRIPTION,
    examples=(
        "mistral-lora pin mistralai/Mistral-7B-Instruct-v0.3",
        "mistral-lora pin mistralai/Mistral-7B-Instruct-v0.3@main",
        "mistral-lora pin recipe.yaml",
        "mistral-lora pin recipe.yaml --branch main",
    ),
)
