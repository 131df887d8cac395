"""The location of an adapter's base: one rule for every command and for the suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pytest_mistral_lora.checkpoint.hub_cache import cached_snapshot
from pytest_mistral_lora.checkpoint.pins import resolve
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.files import base_weights_sha256

_GIVE_BASE = "give its folder with --base (in pytest, with --mistral-base)"


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """The base as a folder records it. All of it is data of unknown origin.

    Attributes:
        name: Hub repository, or the path or name of a local base; empty if nothing names one.
        revision: Its commit; None for a local base.
        weights_sha256: Hash of its weights; None if none is recorded.
        output: The `output` of the recipe that is recorded beside it; empty if there is none.
    """

    name: str
    revision: str | None = None
    weights_sha256: str | None = None
    output: str = ""


@dataclass(frozen=True)
class LocatedBase:
    """The result of looking for a base.

    Attributes:
        folder: Its folder; None if it was not found.
        missing: Why it was not found, and how to provide it; empty if it was.
    """

    folder: Path | None
    missing: str = ""

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of its weights, as `base_weights_sha256` has it; they are read once, which takes time.

        Raises:
            PinError: If there are none.
        """
        return base_weights_sha256(self.require(Path()))

    def require(self, place: Path) -> Path:
        """Return the folder.

        Raises:
            InputError: With the reason, at `place`, if the base was not found.
        """
        if self.folder is None:
            raise InputError(self.missing, place=str(place))
        return self.folder


def locate_base(
    recorded: RecordedBase, adapter: Path, *, given: Path | None = None, may_fetch: bool = False
) -> LocatedBase:
    """Look for the base of an adapter: the folder that the user named, or else the one that is recorded.

    The order is from proof to guess, so that every caller finds the same base: local folders whose weights have the
    recorded hash, the recorded commit in the Hub's cache, local folders that no hash can prove, and, if that is
    allowed, the commit at the Hub.

    Args:
        recorded: The base as the adapter's folder records it.
        adapter: The adapter's folder.
        given: The folder that the user named, or None; it is not checked here.
        may_fetch: Whether a recorded commit may be fetched from the Hub.

    Raises:
        PinError: If a file of the Hub's cache is not the commit's, or the commit cannot be fetched.
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
        if may_fetch and (cached is not None or local is None):
            # a snapshot may lack its weights: names and shapes do not need them, but loading does
            return LocatedBase(resolve(recorded.name, recorded.revision, weights=True))
        if cached is not None:
            return LocatedBase(cached)
    other = f"; {others[0]} has other weights" if others else ""
    return local or LocatedBase(None, f"the base {recorded.name!r} is missing{other}; {_GIVE_BASE}")


def _local_base(recorded: RecordedBase, adapter: Path) -> tuple[LocatedBase | None, list[Path]]:
    """Return the first local folder that can be the recorded base, and those of its name with other weights."""
    others: list[Path] = []
    for folder in _local_places(recorded, adapter):
        try:
            if not (folder / "config.json").is_file():
                continue
            found = LocatedBase(folder)
            if recorded.weights_sha256 is not None:
                if found.weights_sha256 == recorded.weights_sha256:
                    return found, others
                others.append(folder)
            # a link can lead anywhere, and without a hash nothing proves that it leads to the base
            elif not folder.is_symlink() and any(folder.glob("model*.safetensors")):
                return found, others
        except (MistralLoraError, OSError, ValueError):
            continue  # the name is data: it may be too long for a path, or hold a null byte
    return None, others


def _local_places(recorded: RecordedBase, adapter: Path) -> Iterator[Path]:
    """Yield the folders in which a local base may be, from the most to the least specific.

    A recipe names its base by the path from its own folder, in which the output often is, too. If the recipe is
    recorded, its `output` gives the number of folders in between. Joining an absolute name gives that name alone. The
    working directory comes last, so that it decides nothing that the adapter's place decides.
    """
    name, depth = Path(recorded.name), len(Path(recorded.output).parts)
    homes = [adapter.parent, *([adapter.parents[depth - 1]] if 1 < depth <= len(adapter.parents) else [])]
    places = [*(home / name for home in homes), adapter.parent / name.name, name]
    yield from dict.fromkeys(Path(os.path.abspath(place)) for place in places)  # noqa: PTH100
