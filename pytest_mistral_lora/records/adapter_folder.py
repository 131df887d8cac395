"""Merged models: how one is told from an adapter, and how far one may be from base and adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pytest_mistral_lora.checkpoint.pins import resolve
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.records.files import read_json
from pytest_mistral_lora.records.hashing import base_weights_sha256
from pytest_mistral_lora.records.manifest import MANIFEST, load

FARTHEST: Mapping[str, float] = {"float32": 1e-2, "bfloat16": 1.0, "float16": 1.0}
"""Largest difference of a logit that rounding explains, by the dtype of the merged weights; merges of real weights were
seen to give 1e-4 in float32, and 0.2 in bfloat16 with sums in float32."""


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
    """What an adapter's folder says of its base.

    Attributes:
        name: Hub repository, or a local base's name.
        revision: Its commit; None for a local base.
        weights_sha256: Hash of its weights, where one is recorded.
    """

    name: str
    revision: str | None
    weights_sha256: str | None

    @classmethod
    def of(cls, adapter: Path) -> RecordedBase:
        """Read it from the folder's manifest, or else from `adapter_config.json`.

        Raises:
            InputError: If neither can be read, or none names a base.
        """
        if (adapter / MANIFEST).is_file():
            data = load(adapter).data
            return cls(data["base"], data["revision"], data.get("base_weights_sha256"))
        file = adapter / "adapter_config.json"
        config = read_json(file)
        name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
        if not isinstance(name, str) or not name:
            raise InputError("names no base", place=str(file), next_step="Give the base with --base.")
        return cls(name, config.get("revision"), None)

    def find(self, adapter: Path) -> Path:
        """Return the base's folder: the pinned Hub commit, or a local base where its recipe would have it.

        Raises:
            InputError: If it is not at hand.
        """
        if self.revision is not None:
            return resolve(self.name, self.revision, weights=True)
        for folder in self._places(adapter.resolve()):
            if (folder / "config.json").is_file() and self._has_its_weights(folder):
                return folder
        raise InputError(
            f"the base {self.name!r} is not at hand", place=str(adapter), next_step="Give its folder with --base."
        )

    def check(self, folder: Path) -> str:
        """Return the hash of a base's weights, if it is the recorded base.

        A merged model is a base too for what was trained on it, which its recorded hash says; for nothing else.

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

    def _places(self, adapter: Path) -> Iterator[Path]:
        """Yield where a local base may be: its name is its path beside the recipe, and the output often is there."""
        yield from (adapter.parent / self.name, adapter.parent / Path(self.name).name, Path(self.name))
        if adapter.parent.name == Path(self.name).parent.name:
            yield adapter.parent.parent / self.name

    def _has_its_weights(self, folder: Path) -> bool:
        return self.weights_sha256 is None or base_weights_sha256(folder) == self.weights_sha256
