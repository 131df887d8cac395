"""An adapter or a merged model on disk: what its files record, and where its base is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pytest_mistral_lora.chat.reading.jsonl import read_json
from pytest_mistral_lora.checkpoint.hub_cache import cached_snapshot
from pytest_mistral_lora.checkpoint.pins import resolve
from pytest_mistral_lora.errors import InputError, MistralLoraError
from pytest_mistral_lora.records.files import inside
from pytest_mistral_lora.records.hashing import base_weights_sha256
from pytest_mistral_lora.records.manifest import MANIFEST, Manifest, validate

FARTHEST: Mapping[str, float] = {"float32": 1e-2, "bfloat16": 1.0, "float16": 1.0}
"""Largest difference of a logit that rounding explains, by the dtype of the merged weights; merges of real weights were
seen to give 1e-4 in float32, and 0.2 in bfloat16 with sums in float32."""


CONFIG = "adapter_config.json"
_GIVE_BASE = "give its folder with --base (in pytest, with --mistral-base)"


def is_merged(folder: Path) -> bool:
    """Say whether a folder's manifest calls it a merged model; not, where there is no manifest that can be read."""
    try:
        data = read_json(folder / MANIFEST)
    except InputError:
        return False
    return isinstance(data, dict) and data.get("kind") == "merged"


def require_adapter(folder: Path) -> None:
    """Refuse a merged model where an adapter is expected.

    Raises:
        InputError: If the folder's manifest says that it is one.
    """
    if is_merged(folder):
        raise InputError(
            "a merged model (kind merged in its manifest.json): its adapter is in the weights already",
            place=str(folder),
            expected="the folder of an adapter",
            next_step="Name the folder that it was merged from.",
        )


@dataclass(frozen=True, slots=True)
class RecordedBase:
    """What a folder records of its base.

    Attributes:
        name: Hub repository, or the path or name of a local base; empty if nothing names one.
        revision: Its commit; None for a local base.
        weights_sha256: Hash of its weights; None if none is recorded.
    """

    name: str
    revision: str | None
    weights_sha256: str | None

    def check(self, folder: Path) -> str:
        """Return the hash of a base's weights, if it is the recorded base.

        A merged model is a base only of an adapter whose recorded hash is that of its weights.

        Raises:
            InputError: If the weights are others, or no hash is recorded and it is a merged model.
        """
        weights = base_weights_sha256(folder)
        merged = is_merged(folder)
        if weights == self.weights_sha256 or (self.weights_sha256 is None and not merged):
            return weights
        found = f"the weights have SHA-256 {weights}"
        if merged:
            found = f"a merged model (kind merged in its manifest.json), which has an adapter in its weights; {found}"
        recorded = f" with {self.weights_sha256}" if self.weights_sha256 else ""
        raise InputError(
            found,
            place=str(folder),
            expected=f"{self.name}{recorded}, which the adapter was trained on",
            next_step="Give that base with --base.",
        )


@dataclass(frozen=True, slots=True)
class LocatedBase:
    """The result of looking for a base.

    Attributes:
        folder: Its folder; None if it was not found.
        missing: Why it was not found, and how to provide it; empty if it was.
    """

    folder: Path | None
    missing: str = ""

    def require(self, place: Path) -> Path:
        """Return the folder.

        Raises:
            InputError: With the reason, at `place`, if the base was not found.
        """
        if self.folder is None:
            raise InputError(self.missing, place=str(place))
        return self.folder


class AdapterFolder:
    """An adapter or merged model on disk. Each file is read at most once.

    Attributes:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def valid_manifest(self) -> Manifest | None:
        """The manifest; None if there is none, or none that is valid."""
        try:
            return validate(read_json(inside(self.path, MANIFEST)))
        except InputError:
            return None

    @cached_property
    def recorded_base(self) -> RecordedBase:
        """The base as the manifest records it, or else `adapter_config.json`."""
        if self.valid_manifest is not None:
            data = self.valid_manifest.data
            return RecordedBase(data["base"], data["revision"], data.get("base_weights_sha256"))
        try:
            config = read_json(inside(self.path, CONFIG))
        except InputError:
            config = None
        config = config if isinstance(config, dict) else {}
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        return RecordedBase(
            name if isinstance(name, str) else "", revision if isinstance(revision, str) else None, None
        )

    def locate_base(self, given: Path | None = None, *, fetch: bool = False) -> LocatedBase:
        """Look for the base: the folder that the user named, or else the one that is recorded.

        The order is from proof to guess, so that every caller finds the same base: local folders whose weights have the
        recorded hash, the recorded commit in the Hub's cache, and only then local folders that no hash can prove.

        Args:
            given: The folder that the user named; it is not checked here.
            fetch: Whether a recorded commit may be fetched from the Hub, as the last resort. The suite never fetches.

        Raises:
            PinError: If a file of the Hub's cache is not the commit's, or the commit cannot be fetched.
        """
        if given is not None:
            return LocatedBase(given)
        recorded = self.recorded_base
        if not recorded.name:
            return LocatedBase(None, f"neither {MANIFEST} nor {CONFIG} names the base; {_GIVE_BASE}")
        other_weights: list[Path] = []
        local = self._local_base(other_weights)
        if local is not None and recorded.weights_sha256 is not None:
            return LocatedBase(local)
        if recorded.revision is not None:
            cached = cached_snapshot(recorded.name, recorded.revision)
            if cached is not None or (local is None and fetch):
                # a snapshot may lack its weights, which names and shapes do not need, and loading does
                return LocatedBase(resolve(recorded.name, recorded.revision, weights=True) if fetch else cached)
        if local is not None:
            return LocatedBase(local)
        others = "".join(f"; {folder} has other weights" for folder in other_weights[:1])
        return LocatedBase(None, f"the base {recorded.name!r} is missing{others}; {_GIVE_BASE}")

    def _local_base(self, other_weights: list[Path]) -> Path | None:
        """Return the first local folder that can be the recorded base; add those of its name with other weights."""
        weights = self.recorded_base.weights_sha256
        for folder in self._local_places():
            try:
                if not (folder / "config.json").is_file():
                    continue
                if weights is None and (folder.is_symlink() or not any(folder.glob("model*.safetensors"))):
                    continue  # a link can lead anywhere, and without a hash nothing proves that it leads to the base
                if weights is None or base_weights_sha256(folder) == weights:
                    return folder
                other_weights.append(folder)
            except (MistralLoraError, OSError, ValueError):
                continue  # the name is data: it may be too long for a path, or hold a null byte
        return None

    def _local_places(self) -> Iterator[Path]:
        """Yield the folders in which a local base may be, from the most to the least specific.

        A recipe names its base by the path from its own folder, in which the output often is, too. If the manifest
        records the recipe, its `output` gives the number of folders in between. Joining an absolute name gives that
        name alone. The working directory comes last, so that it decides nothing that the adapter's place decides.
        """
        name, own = Path(self.recorded_base.name), self.path.resolve()
        recipe = self.valid_manifest.data.get("recipe", {}) if self.valid_manifest is not None else {}
        depth = len(Path(str(recipe.get("output", "."))).parts)
        homes = [own.parent, *([own.parents[depth - 1]] if 1 < depth <= len(own.parents) else [])]
        places = [*(home / name for home in homes), own.parent / name.name, name]
        yield from dict.fromkeys(Path(os.path.abspath(place)) for place in places)  # noqa: PTH100
