"""The base model of a new recipe: its pin, and the tokenizer that it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pytest_mistral_lora.errors import InputError, NoOracleError, PinError
from pytest_mistral_lora.starter.rows import path_in_recipe, yaml_text

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe

Backend = Literal["mistral-common", "chat-template"]


@dataclass(frozen=True)
class ChosenBase:
    """The base of a recipe.

    Attributes:
        name: The repository's id, or the local folder as the recipe names it.
        title: The base and its pin, for people.
        lines: Its keys in the recipe, as lines of YAML.
        backend: The code that turns rows into ids.
        folder: The local folder with its tokenizer; None if it is not on this machine.
        local: Whether it is a folder of the user, not a repository of the Hub.
        missing: The reason why it is not pinned, or why its tokenizer is not here; empty if nothing is missing.
        pinned: Whether it has its pin.
    """

    name: str
    title: str
    lines: tuple[str, ...]
    backend: Backend = "mistral-common"
    folder: Path | None = None
    local: bool = False
    missing: str = ""
    pinned: bool = True


def choose_base(text: str, folder: Path) -> ChosenBase:
    """Return the base that a text names: a local checkpoint folder, or `OWNER/NAME[@BRANCH]` on the Hub.

    Args:
        text: The folder, relative to the working directory, or the repository.
        folder: The folder of the recipe.

    Raises:
        InputError: If it is neither, or a local folder has no weights or no tokenizer that loads.
        PinError: If the Hub has no such repository, branch or tag.
    """
    path = Path(text)
    if path.is_dir():
        return _local(path, folder)
    repo, _, branch = text.partition("@")
    if repo.count("/") != 1 or repo.startswith((".", "/")) or path.exists():
        found = "is a file" if path.exists() else "is no folder, and no id of a Hub repository"
        raise InputError(found, place=f"--base {text}", expected="a checkpoint folder, or OWNER/NAME[@BRANCH]")
    return _of_hub(repo, branch or "main")


def base_of_recipe(recipe: Recipe) -> ChosenBase:
    """Return the base of a recipe that is there."""
    base = recipe.base
    if base.path is not None:
        name, folder = str(base.name), base.path if base.path.is_dir() else None
        missing = "" if folder else f"there is no folder {base.path}"
        return ChosenBase(name, name, (), recipe.backend, folder, local=True, missing=missing)
    files, missing = _text_files(str(base.repo), str(base.revision))
    return ChosenBase(base.label, f"{base.repo} at {base.revision}", (), recipe.backend, files, missing=missing)


def _local(path: Path, folder: Path) -> ChosenBase:
    from pytest_mistral_lora.records.files import base_weights_sha256

    backend = _backend(path)
    digest, name = base_weights_sha256(path), path_in_recipe(path, folder)
    lines = (f"  path: {name}", f"  weights_sha256: {digest}  # of model*.safetensors")
    title = f"{name}, weights with SHA-256 {digest[:12]}…"
    return ChosenBase(name, title, lines, backend, path, local=True)


def _of_hub(repo: str, branch: str) -> ChosenBase:
    """Return a base of the Hub; if its commit cannot be found out here, the recipe has the branch in its place."""
    from huggingface_hub import errors
    from huggingface_hub.constants import ENDPOINT

    from pytest_mistral_lora.checkpoint.pins import find_commit

    wrong = errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.HFValidationError
    try:
        found = find_commit(repo, branch, place="--base")
    except PinError as error:
        if isinstance(error.__cause__, wrong):
            raise
        page = f"{ENDPOINT}/{repo}/commits/{branch}"
        reason = f"{error.found}. Or write the commit from {page} into recipe.yaml, base.revision"
        to_do = "TO DO: its commit. Online, run: mistral-lora pin recipe.yaml"
        lines = (f"  repo: {yaml_text(repo)}", f"  revision: {yaml_text(branch)}  # {to_do}")
        return ChosenBase(repo, f"{repo}, not pinned", lines, missing=reason, pinned=False)
    files, missing = _text_files(repo, found.commit)
    when = "when it was last fetched" if found.source == "cache" else "when this file was written"
    comment = f"  # {branch}, {when}" if found.commit != branch else ""
    lines = (f"  repo: {yaml_text(repo)}", f"  revision: {found.commit}{comment}")
    title = f"{repo} at {found.commit}"
    backend: Backend = "mistral-common" if files is None else _backend(files)
    return ChosenBase(repo, title, lines, backend, files, missing=missing)


def _text_files(repo: str, commit: str) -> tuple[Path | None, str]:
    """Return the folder with configuration and tokenizer at a commit, or None and the reason."""
    from pytest_mistral_lora.checkpoint.pins import resolve

    try:
        return resolve(repo, commit, weights=False), ""
    except PinError as error:
        return None, str(error)


def _backend(folder: Path) -> Backend:
    """Return the backend that fits a checkpoint: its template, if no Mistral tokenizer applies.

    Raises:
        InputError: If it has no tokenizer that loads.
    """
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    tokenizer = CheckpointTokenizer(folder)
    try:
        _ = tokenizer.oracle
    except NoOracleError as error:
        if tokenizer.has_template:
            return "chat-template"
        found = f"no Mistral tokenizer, and no chat template: {error.found}"
        raise InputError(found, place=str(folder), expected="tekken.json, tokenizer.model.vN or a template") from error
    return "mistral-common"
