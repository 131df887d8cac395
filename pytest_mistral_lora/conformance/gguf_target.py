"""The target of a GGUF file, and what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_mistral_lora.conformance.causes import KeptProperty
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import NoOracleError

if TYPE_CHECKING:
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
    from pytest_mistral_lora.serving.gguf_file import GgufFile


@dataclass(frozen=True)
class GgufTarget(Target):
    """A GGUF file, as llama.cpp and Ollama read it: of a model, or of an adapter.

    Attributes:
        judge: The target whose tokenizer it is held to; None for that of the folders, or the recognised one.
        base: The base checkpoint's folder, or None.
        folders: The adapter and merged folders of the run: one of them may be the source of the file.
    """

    judge: Target | None = None
    base: Path | None = None
    folders: tuple[Path, ...] = ()

    @property
    def file(self) -> Path:
        """The GGUF file."""
        return self.path or Path(self.name)

    @KeptProperty
    def content(self) -> GgufFile:
        """The file's metadata and tensors.

        Raises:
            InputError: If it cannot be read.
        """
        from pytest_mistral_lora.serving.gguf_file import GgufFile

        return GgufFile(self.file)

    @property
    def model(self) -> Path | None:
        """The folder of full weights that the file is compared with: a merged model, else the base; None without."""
        merged = (one for one in self.folders if any(one.glob("model*.safetensors")))
        return next(merged, self.base)

    @property
    def adapter(self) -> Path | None:
        """The adapter folder that an adapter's file is compared with; None without one."""
        return next((one for one in self.folders if (one / "adapter_config.json").exists()), None)

    @KeptProperty
    def tokenizer(self) -> CheckpointTokenizer:
        """The tokenizer that the file is held to: the one that is named, that of its model, or the recognised one.

        Raises:
            NoOracleError: If none is named, and the vocabulary is not that of a known tokenizer.
            TokenizerError: If it cannot be loaded.
        """
        from pytest_mistral_lora.chat.oracle import SHIPPED, shipped_tokenizer
        from pytest_mistral_lora.checkpoint.recognition import NAME_IT, recognise_vocabulary
        from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

        if self.judge is not None:
            return self.judge.tokenizer
        if self.oracle_name is not None:
            known = self.oracle_name in SHIPPED
            return CheckpointTokenizer(shipped_tokenizer(self.oracle_name) if known else Path(self.oracle_name))
        if self.model is not None:
            return CheckpointTokenizer(self.model)
        stored = self.content.vocabulary
        found = None if stored is None else recognise_vocabulary(stored, self.content.template or "")
        if found is None or found.oracle is None:
            kind = f"its vocabulary is of the kind {self.content.setting('model')!r}"
            reason = kind if found is None else found.reason
            raise NoOracleError(reason, place=str(self.file), expected="a Mistral tokenizer", next_step=NAME_IT)
        return CheckpointTokenizer(found.oracle.path)
