"""An adapter that is asked: its base, and the model, loaded once for all of its checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.conformance.adapter.base import Base, enough_memory, find_base

if TYPE_CHECKING:
    from pytest_mistral_lora.training.answers.golden import Adapted


@dataclass(frozen=True, eq=False)
class Answering:
    """An adapter, or a merged model, under judgement.

    Attributes:
        folder: Its folder.
        given: The base that the user named, or None.
        device: Where the model runs: `auto`, `cpu` or `cuda`.
    """

    folder: Path
    given: Path | None
    device: str

    @cached_property
    def base(self) -> Base:
        """The base, where it is at hand; a merged model is its own."""
        return Base(self.folder) if self.merged else find_base(self.given, self.folder)

    @cached_property
    def merged(self) -> bool:
        """Whether it is a merged model."""
        from pytest_mistral_lora.records.merged import is_merged

        return is_merged(self.folder)

    @cached_property
    def missing(self) -> str:
        """Why the adapter cannot be asked; empty where it can, as far as its files are sound."""
        if self.base.folder is None:
            return self.base.missing
        _loaded.cache_clear()  # the model of the adapter before takes memory that this one may need
        return enough_memory(self.base.folder)

    @cached_property
    def adapted(self) -> Adapted:
        """The adapter and its base, before a weight is loaded.

        Raises:
            InputError: If they do not go together.
        """
        from pytest_mistral_lora.training.answers.golden import Adapted

        return Adapted.find(self.folder, None if self.merged else self.base.folder, device=self.device)

    @property
    def model(self) -> Any:
        """Base with adapter, in eval mode."""
        return _loaded(self)


@lru_cache(maxsize=1)  # adapters are judged one after the other, and memory may hold only one model
def _loaded(answering: Answering) -> Any:
    return answering.adapted.load()
