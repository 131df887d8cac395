"""What one run of the suite judges."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle
    from pytest_mistral_lora.chat.template import ChatTemplate
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

EMBEDDED = ("spm-v1", "spm-v2", "spm-v3", "spm-v7", "spm-v7m1", "tekken-240718", "tekken-240911")
"""The embedded default: every tokenizer that mistral-common ships, by our name."""

EMBEDDED_TRAINING = "spm-v3"
"""The embedded tokenizer that the tiny model is trained with: small, so that it is quick."""


@dataclass(frozen=True)
class Target:
    """A tokenizer file or checkpoint folder, or one that mistral-common ships.

    Attributes:
        name: Its part of the node ids.
        path: The file or folder; None for a shipped one.
        trains: Whether the end-to-end train runs with it.
    """

    name: str
    path: Path | None = None
    trains: bool = False
    _loaded: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer, loaded on first use and kept for the session.

        Raises:
            TokenizerError: If there is none.
        """
        from pytest_mistral_lora.chat.oracle import shipped_tokenizer
        from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

        return CheckpointTokenizer(shipped_tokenizer(self.name) if self.path is None else self.path)

    @property
    def oracle(self) -> Oracle:
        """Mistral's own tokenization of this target."""
        return self.tokenizer.oracle

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of this target."""
        from pytest_mistral_lora.chat.template import ChatTemplate

        return ChatTemplate(self.tokenizer.fast)

    @cached_property
    def shipped_name(self) -> str | None:
        """Our name of the shipped tokenizer that has the same bytes, or None: where packaged ids apply."""
        from pytest_mistral_lora.records.goldens import shipped_hashes

        return next((name for name, digest in shipped_hashes().items() if digest == self.oracle.sha256), None)


def embedded_targets() -> list[Target]:
    """Return the targets of a run that names none."""
    return [Target(name, trains=name == EMBEDDED_TRAINING) for name in EMBEDDED]


def tokenizer_targets(paths: Sequence[Path]) -> list[Target]:
    """Return a target for each tokenizer path, named after it; equal names get a number."""
    names: list[str] = []
    for path in paths:
        # a file of the Hub's cache is a link to one that is named by its hash
        name = path.resolve().name if path.is_dir() else path.name
        names.append(free_name(re.sub(r"[^\w.+-]+", "-", name).strip("-") or "tokenizer", names))
    return [Target(name, path, trains=True) for name, path in zip(names, paths, strict=True)]


def free_name(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken: the name itself, or with the first free number from 2 on."""
    return next(free for free in (name, *(f"{name}-{n}" for n in range(2, len(taken) + 3))) if free not in taken)
