"""Errors that keep every check of a target from judging: each is kept with its target, and reported by one check."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar, overload

from filelock import FileLock

from pytest_mistral_lora.errors import MistralLoraError, PinError, RecipeError, TokenizerError

UNLOADABLE: Mapping[type[MistralLoraError], str] = {RecipeError: "ML640", PinError: "ML208", TokenizerError: "ML201"}
"""The rule of each error that keeps every check of a target from judging."""


@dataclass(frozen=True, slots=True)
class Causes:
    """The errors that keep checks of a run from judging, such as a missing base: one check reports each of them.

    Attributes:
        folder: A folder that all workers of the run share.
    """

    folder: Path

    def reporter(self, error: Exception, name: str) -> str:
        """Return the name of the check that reports an error: the first that met it, in any process."""
        digest = hashlib.sha256(f"{type(error).__name__}: {error}".encode("utf-8", "surrogatepass")).hexdigest()
        file = self.folder / f"cause-{digest[:16]}.txt"
        with FileLock(f"{file}.lock"):
            if not file.is_file():
                file.write_text(name, encoding="utf-8")
            return file.read_text(encoding="utf-8")


_T = TypeVar("_T")


class KeptProperty(cached_property[_T]):
    """A cached property that keeps its error, too: to hash a base's weights again for each check would take hours."""

    @overload
    def __get__(self, instance: None, owner: type[Any] | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type[Any] | None = None) -> _T: ...

    def __get__(self, instance: object, owner: type[Any] | None = None) -> Any:
        """Return the value, or raise the error, of the first access."""
        if instance is None:
            return self
        key = f"{self.attrname} failed"
        if key in vars(instance):
            raise vars(instance)[key]
        try:
            return super().__get__(instance, owner)
        except MistralLoraError as error:
            vars(instance)[key] = error.with_traceback(None)
            raise
