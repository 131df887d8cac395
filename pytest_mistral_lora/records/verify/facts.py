"""A fact of a manifest, computed again: it matches, it does not, or there is nothing to compute it from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pytest_mistral_lora.errors import MistralLoraError

State = Literal["match", "mismatch", "not available"]


@dataclass(frozen=True)
class Fact:
    """One recorded fact, computed again.

    Attributes:
        name: Its JSON path in the manifest, without `$.`.
        state: Whether it was found again.
        recorded: What the manifest says; None of a file that it does not list.
        found: What was computed, or why it could not be.
        place: The artifact that it was computed from; empty where there is none.
    """

    name: str
    state: State
    recorded: Any
    found: Any
    place: str = ""

    @property
    def is_unlisted(self) -> bool:
        """Whether it is about a file that the manifest does not list."""
        return self.recorded is None and self.name.startswith("files.")


def computed(name: str, recorded: Any, compute: Callable[[], Any], place: Path | str) -> Fact:
    """Return a fact whose artifact is at hand; what cannot be computed from it is a mismatch."""
    try:
        found = compute()
    except (MistralLoraError, OSError, KeyError, TypeError, ValueError) as error:  # a damaged artifact, of any kind
        return Fact(name, "mismatch", recorded, f"cannot be computed: {error}", str(place))
    return Fact(name, "match" if found == recorded else "mismatch", recorded, found, str(place))


def absent(name: str, recorded: Any, why: str) -> Fact:
    """Return a fact that there is nothing to compute from."""
    return Fact(name, "not available", recorded, why)
