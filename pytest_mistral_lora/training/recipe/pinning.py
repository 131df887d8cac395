"""Find the pinned base of a recipe, or pin it in the file: only the value changes, and comments and order stay."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from pytest_mistral_lora.checkpoint.pins import find_commit, resolve
from pytest_mistral_lora.errors import PinError, RecipeError
from pytest_mistral_lora.records.files import base_weights_command, base_weights_sha256, write_text
from pytest_mistral_lora.training.recipe import Base, parse_recipe
from pytest_mistral_lora.training.recipe.reading import read_yaml, shown


@dataclass(frozen=True)
class PinnedBase:
    """The pin that was written into a recipe.

    Attributes:
        key: `base.revision`, or `base.weights_sha256` of a local base.
        before: The value that stood there; empty if there was none.
        value: The value that stands there now.
        source: The one who knew it: `hub`, `cache`, `given` (see `FoundCommit`), or `weights` of a local base.
        name: The branch or tag; empty for a local base.
    """

    key: str
    before: str
    value: str
    source: Literal["hub", "cache", "given", "weights"]
    name: str = ""


def pin_recipe(path: Path, branch: str | None = None) -> PinnedBase:
    """Write the commit of a recipe's base into the recipe, or the hash of a local base's weights.

    Args:
        path: The recipe.
        branch: The branch or tag to pin; None for the one that the recipe names, or `main`. A recipe that is pinned
            already then stays as it is.

    Raises:
        RecipeError: If the recipe cannot be read, or has another fault than its pin.
        PinError: If the commit cannot be found out, or a local base has no weights.
    """
    data, _ = read_yaml(path)
    base = data.get("base") if isinstance(data, dict) else None
    if not isinstance(base, dict) or not (base.get("repo") or base.get("path")):
        expected = "a recipe with base: {repo: owner/name} or base: {path: FOLDER}"
        raise RecipeError("there is no base to pin", place=f"{path}, base", expected=expected)
    if base.get("repo"):
        pinned = _of_repository(str(base["repo"]), base.get("revision"), branch, path)
        after = "repo"
    else:
        found = base_weights_sha256(path.parent / str(base["path"]))
        pinned = PinnedBase("base.weights_sha256", str(base.get("weights_sha256") or ""), found, "weights")
        after = "path"
    key = pinned.key.rpartition(".")[2]
    # with its pin, a recipe must be sound: nothing is written into a file with another fault
    parse_recipe({**data, "base": {**base, key: pinned.value}}, folder=path.parent, place=str(path))
    if pinned.value != pinned.before:
        text = path.read_text(encoding="utf-8-sig")
        changed = _with_value(text, key, pinned.value, after)
        write_text(path, changed)
    return pinned


def _of_repository(repo: str, before: Any, branch: str | None, path: Path) -> PinnedBase:
    """Return the pin of a Hub base: a commit that is there already stays, unless a branch is named."""
    written = "" if before is None else str(before)
    is_pinned = len(written) == 40 and not set(written) - set("0123456789abcdef")
    if is_pinned and branch is None:
        return PinnedBase("base.revision", written, written, "given", written)
    name = branch or written or "main"
    asked = shlex.quote(str(path)) + (f" --branch {shlex.quote(branch)}" if branch else "")
    found = find_commit(repo, name, place=f"{path}, base.revision", pinned=asked)
    return PinnedBase("base.revision", written, found.commit, found.source, name)


def _with_value(text: str, key: str, value: str, after: str) -> str:
    """Return a recipe's text with a value of its base; without the key, it is put after another key of the base."""
    base = _entry(yaml.compose(text, Loader=yaml.SafeLoader), "base")[1]
    for name, node in base.value:
        if name.value == key:
            # the marks of an empty value are those of the place behind it
            before = text[: node.start_mark.index].rstrip(" ") if not node.value else text[: node.start_mark.index]
            space = "" if before.endswith(" ") else " "
            return f"{before}{space}{value}{text[node.end_mark.index :]}"
    first, node = _entry(base, after)
    end = node.end_mark.index
    if base.flow_style:
        return f"{text[:end]}, {key}: {value}{text[end:]}"
    # on a line of its own, behind the comment of the other key's line
    line_end = text.find("\n", end)
    line_end = len(text) if line_end < 0 else line_end
    return f"{text[:line_end]}\n{' ' * first.start_mark.column}{key}: {value}{text[line_end:]}"


def _entry(mapping: Any, key: str) -> tuple[yaml.Node, yaml.MappingNode]:
    for name, node in mapping.value:
        if name.value == key:
            return name, node
    # a merge key, `<<: *base`, has it elsewhere
    raise RecipeError(
        f"{shown(key)} is not written out", place="base", expected=f"{key}: as a key of its own, to be pinned"
    )


def resolve_base(base: Base, *, weights: bool = True) -> Path:
    """Return the base checkpoint's folder, its pin checked.

    Args:
        base: The recipe's section.
        weights: Whether the weights of a Hub base are needed; those of a local base always are.

    Raises:
        PinError: If it is missing, or its weights are not the pinned ones.
    """
    if base.path is None:
        return resolve(str(base.repo), str(base.revision), weights=weights)
    found = base_weights_sha256(base.path)
    if found != base.weights_sha256:
        raise PinError(
            f"the weights of {base.path} have SHA-256 {found}",
            place="base.weights_sha256",
            expected=str(base.weights_sha256),
            next_step=f"Pin these weights or restore those; the hash is printed by: {base_weights_command(base.path)}",
        )
    return base.path
