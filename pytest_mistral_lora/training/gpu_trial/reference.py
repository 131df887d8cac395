"""The recorded tiny runs of a CPU, with which those of a GPU are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.version import Version

FILE = Path(__file__).with_name("reference.json")
"""Written by `scripts/record_gpu_reference.py`."""

PRECISIONS = ("fp32", "bf16", "fp16")
_LIBRARIES = ("torch", "transformers", "peft", "accelerate")
"""The packages whose version can change a loss."""


@dataclass(frozen=True)
class RecordedRuns:
    """Losses and gradient norms of the tiny run on a CPU.

    Attributes:
        versions: The libraries that made them.
        processor: The instruction set of the CPU.
        base_weights_sha256: Hash of the weights of the tiny base.
        runs: `losses`, in nats a token, and `gradient_norms` of each step, by the precision of the base. fp16 is a
            stand-in: accelerate trains in it on a GPU alone.
    """

    versions: Mapping[str, str]
    processor: str
    base_weights_sha256: str
    runs: Mapping[str, Mapping[str, Sequence[float]]]

    def differences(self, base_weights_sha256: str) -> tuple[str, ...]:
        """Return why a run on this machine can have other losses; empty if it has those that were recorded.

        Args:
            base_weights_sha256: Hash of the weights of the tiny base, made here.
        """
        here = versions()
        found = [
            f"{name} {here[name]} (recorded with {was})" for name, was in self.versions.items() if here[name] != was
        ]
        if base_weights_sha256 != self.base_weights_sha256:
            found.append("other weights of the tiny base")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain JSON data."""
        return asdict(self)


@cache
def recorded() -> RecordedRuns:
    """Return the reference that the package ships."""
    return RecordedRuns(**json.loads(FILE.read_text(encoding="utf-8")))


def versions() -> dict[str, str]:
    """Return the versions of the libraries here, without the build of torch."""
    return {name: Version(version(name)).public for name in _LIBRARIES}
