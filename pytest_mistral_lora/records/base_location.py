"""The location of an adapter's base, and the weights and configuration that prove it: one rule for all commands."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.hub_cache import cached_snapshot, is_repository
from pytest_mistral_lora.checkpoint.pins import resolve
from pytest_mistral_lora.errors import InputError, MistralLoraError

_GIVE_BASE = "give its folder with --base (in pytest, with --mistral-base)"


def base_weights_command(folder: Path) -> str:
    """Return a shell command that prints the hash of a checkpoint's weights."""
    several = "" if (folder / "model.safetensors").is_file() else ' | cut -d" " -f1 | sha256sum'
    return f"sha256sum {shlex.quote(str(folder))}/model*.safetensors{several}"


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """The base that a folder records. All of it is data of unknown origin.

    Attributes:
        name: Hub repository, or the path or name of a local base; empty if nothing names one.
        revision: Its commit; None for a local base.
        weights_sha256: Hash of its weights; None if it is not recorded.
        output: The `output` of the recipe that is recorded beside it; empty if it is not recorded.
        config: Its `BaseFolder.canonical_config` in training; None if it is not recorded.
    """

    name: str
    revision: str | None = None
    weights_sha256: str | None = None
    output: str = ""
    config: Mapping[str, Any] | None = None

    def require_config(self, base: BaseFolder) -> None:
        """Refuse a base that has the recorded weights, and a configuration that computes something else with them.

        Raises:
            InputError: With the first key of another value; without a recorded configuration, nothing is refused.
            PinError: As for `BaseFolder.architecture` and `BaseFolder.canonical_config`.
        """
        if not self.config:
            return
        _ = base.architecture  # a class that cannot be loaded is the clearer reason
        now = changed_config(self.config, base.canonical_config)
        for key, recorded in self.config.items():
            if now[key] != recorded:
                raise InputError(
                    f"{key} is {json.dumps(now[key])}",
                    place=str(base.config_file),
                    expected=f"{json.dumps(recorded)}, with which the adapter was trained",
                    next_step="Give the base as it was in training with --base.",
                )


@dataclass(frozen=True)
class LocatedBase:
    """The result of looking for a base.

    Attributes:
        folder: Its folder; None if it was not found.
        missing: Why it was not found, and how to provide it; empty if it was.
    """

    folder: BaseFolder | None
    missing: str = ""

    def require(self, place: Path) -> BaseFolder:
        """Return the folder.

        Raises:
            InputError: With the reason, at `place`, if the base was not found.
        """
        if self.folder is None:
            raise InputError(self.missing, place=str(place))
        return self.folder


def changed_config(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorded values as they are now; a key that this version of transformers does not have is kept."""
    return {key: now.get(key, value) for key, value in recorded.items()}


def locate_base(
    recorded: RecordedBase, adapter: Path, *, given: BaseFolder | None = None, may_fetch: bool = False
) -> LocatedBase:
    """Look for the base of an adapter: the folder that the user named, or else the one that is recorded.

    The order is from proof to guess, so that every caller finds the same base: local folders whose weights have the
    recorded hash, the recorded commit in the Hub's cache, local folders that no hash can prove, and, if
    allowed, the commit at the Hub.

    Args:
        recorded: The base as the adapter's folder records it.
        adapter: The adapter's folder.
        given: The base that the user named, or None; it is not checked here.
        may_fetch: Whether a recorded commit may be fetched from the Hub.

    Raises:
        PinError: If a file in the Hub's cache differs from the commit's, or the commit cannot be fetched.
    """
    if given is not None:
        return LocatedBase(given)  # the caller compares its weights: another base is an error, not a missing one
    if not recorded.name:
        return LocatedBase(None, f"nothing in {adapter} names the base; {_GIVE_BASE}")
    local, others = _local_base(recorded, adapter.resolve())
    if local is not None and recorded.weights_sha256 is not None:
        return local
    if recorded.revision is not None:
        cached = cached_snapshot(recorded.name, recorded.revision)
        if may_fetch and (cached is not None or (local is None and is_repository(recorded.name))):
            # a snapshot may lack its weights: names and shapes do not need them, but loading does
            return LocatedBase(BaseFolder(resolve(recorded.name, recorded.revision, weights=True)))
        if cached is not None:
            return LocatedBase(BaseFolder(cached))
    other = f"; {others[0]} has other weights" if others else ""
    return local or LocatedBase(None, f"the base {recorded.name!r} is missing{other}; {_GIVE_BASE}")


def recipe_folder(adapter: Path, output: str) -> Path:
    """Return the folder of the recipe that made an adapter, or the adapter's parent if the adapter was moved.

    Args:
        adapter: The adapter's folder, absolute.
        output: The recorded `output` of the recipe; empty if it is not recorded.
    """
    # the output's path has as many parts as there are folders from the recipe down, if it leads below the recipe
    parts = Path(output).parts
    below = not Path(output).is_absolute() and ".." not in parts
    return adapter.parents[len(parts) - 1 if below and 0 < len(parts) <= len(adapter.parents) else 0]


def _local_places(recorded: RecordedBase, adapter: Path) -> list[Path]:
    # A recipe names its base by the path from its own folder, in which the output often is, too. Joining an absolute
    # name gives that name alone. The working directory comes last, so that it decides nothing that the adapter's place
    # decides.
    name, homes = Path(recorded.name), (adapter.parent, recipe_folder(adapter, recorded.output))
    places = [*(home / name for home in homes), adapter.parent / name.name, name]
    return [*dict.fromkeys(Path(os.path.normpath(Path.cwd() / place)) for place in places)]


def _local_base(recorded: RecordedBase, adapter: Path) -> tuple[LocatedBase | None, list[Path]]:
    """Return the first local folder that can be the recorded base, and the folders of its name with other weights."""
    others: list[Path] = []
    for folder in _local_places(recorded, adapter):
        try:
            if not (folder / "config.json").is_file():
                continue
            base = BaseFolder(folder)
            if recorded.weights_sha256 is not None:
                if base.weights_sha256 == recorded.weights_sha256:
                    return LocatedBase(base), others
                others.append(folder)
            # a link can lead anywhere, and without a hash nothing proves that it leads to the base
            elif not folder.is_symlink() and any(folder.glob("model*.safetensors")):
                return LocatedBase(base), others
        except (MistralLoraError, OSError, ValueError):
            continue  # the name is data: it may be too long for a path, or hold a null byte
    return None, others
