"""The two backends that turn a row into ids in training: mistral-common, and the checkpoint's own chat template."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.oracle.tokenizer_file import TEKKEN, oracle_file
from pytest_mistral_lora.chat.pieces import spelled_bytes
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizer_folder import SPM_MODEL
from pytest_mistral_lora.checkpoint.tokenizers import TOKENIZER_JSON, CheckpointTokenizer
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import Place

Backend = Literal["mistral-common", "chat-template"]


@dataclass(frozen=True)
class Encoder(ABC):
    """The backend of a run.

    Attributes:
        backend: Its name in recipes, manifests and transcripts.
        tokenizer: The tokenizer of the base model, or a copy of it in an adapter's folder.
    """

    backend: ClassVar[Backend]
    tokenizer: CheckpointTokenizer

    @abstractmethod
    def encode(self, row: Row) -> EncodedRow:
        """Encode a row with labels.

        Raises:
            RowError: If the backend refuses the row, cannot label it, or would take its text for control tokens.
        """

    @abstractmethod
    def prompt(self, row: Row) -> tuple[int, ...]:
        """Return the ids that the row's last assistant turn follows, as at inference.

        Raises:
            RowError: If the backend refuses the row, or the beginning of the turn is not known.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return ids as text, without control tokens."""

    def answer_text(self, row: Row, ids: Sequence[int]) -> str:
        """Return the ids of an answer to a row as text, without control tokens.

        Args:
            row: The row.
            ids: The ids behind its prompt.
        """
        return self.decode(ids)

    @abstractmethod
    def piece(self, token: int) -> str:
        """Return the vocabulary's spelling of a token."""

    @abstractmethod
    def shown(self, token: int) -> str:
        r"""Return one token for people: for a vocabulary of bytes, its text; a part of a character as `\xf0`."""

    @property
    def template(self) -> ChatTemplate:
        """The chat template of the tokenizer, which may have one more for rows with tools."""
        return self.tokenizer.template

    @property
    @abstractmethod
    def file(self) -> Path:
        """The tokenizer file that decides the ids."""

    @property
    def file_name(self) -> str:
        """The name of that file in the folder of an adapter.

        The file's own name if it is in the tokenizer's folder; else the name that libraries expect for its kind.
        """
        if self.file.parent == self.tokenizer.path or self.file == self.tokenizer.path:
            return self.file.name
        return TEKKEN if self.tokenizer.oracle.kind == "tekken" else f"{SPM_MODEL}{self.file.suffix}"

    @abstractmethod
    def require(self, objective: Objective, place: Place) -> None:
        """Refuse an objective that says nothing for the tokenizer.

        Args:
            objective: The objective.
            place: The key that declares it.

        Raises:
            InputError: If it names a control token that the tokenizer does not have.
        """

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Number of ids."""

    @property
    @abstractmethod
    def eos_id(self) -> int:
        """Id of `</s>`."""


@dataclass(frozen=True)
class OracleEncoder(Encoder):
    """The backend `mistral-common`: Mistral's own tokenization."""

    backend: ClassVar[Backend] = "mistral-common"

    def encode(self, row: Row) -> EncodedRow:
        """Encode a row with mistral-common, labels by the assistant's turns."""
        return self.tokenizer.oracle.encode(row)

    def prompt(self, row: Row) -> tuple[int, ...]:
        """Return the prompt as mistral-common encodes it for inference."""
        return self.tokenizer.oracle.encode_prompt(row)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of mistral-common's decoder."""
        return self.tokenizer.oracle.decode(list(ids))

    def answer_text(self, row: Row, ids: Sequence[int]) -> str:
        """Return the text of mistral-common's decoder; a completion keeps the space that it begins with."""
        return row.kind.answer_text(self.tokenizer.oracle, ids)

    def piece(self, token: int) -> str:
        """Return the token in the vocabulary of the Mistral tokenizer file."""
        return self.tokenizer.oracle.piece(token)

    def shown(self, token: int) -> str:
        """Return the token for people."""
        piece = self.piece(token)
        return spelled_bytes(self.tokenizer.oracle.vocabulary[token]) if "\ufffd" in piece else piece

    def require(self, objective: Objective, place: Place) -> None:
        """Refuse an objective about a control token that the Mistral tokenizer file does not have."""
        if objective.without:
            objective.require(self.tokenizer.oracle.control_ids, self.tokenizer.oracle.version, place)

    @property
    def file(self) -> Path:
        """The Mistral tokenizer file of the folder, which is not loaded, or of the tokenizer that is recognised."""
        return oracle_file(self.tokenizer.path) or self.tokenizer.oracle.path

    @property
    def vocab_size(self) -> int:
        """Number of ids of the Mistral tokenizer file, control tokens included."""
        return self.tokenizer.oracle.vocab_size

    @property
    def eos_id(self) -> int:
        """Id of `</s>` in the Mistral tokenizer file."""
        return self.tokenizer.oracle.eos_id


@dataclass(frozen=True)
class TemplateEncoder(Encoder):
    """The backend `chat-template`: the transformers tokenizer, and a chat template with generation blocks.

    Attributes:
        source: Text of the template; None for the tokenizer's own.
    """

    backend: ClassVar[Backend] = "chat-template"
    source: str | None = None

    @cached_property
    def template(self) -> ChatTemplate:
        """The template with its tokenizer: one for all rows, because a run's folder has only one."""
        return ChatTemplate(self.tokenizer.fast, self.source or self.tokenizer.template.source)

    def encode(self, row: Row) -> EncodedRow:
        """Render a row and tokenize the text, labels by the generation blocks."""
        # the rendered text is one string: a control token spelled by the row looks like one written by the template
        literals = self.template.control_literals(row)
        if literals:
            raise RowError(
                f"the text spells control tokens ({', '.join(literals)}), which this backend would encode as such",
                place=row.place,
                next_step="Change the text, or train with backend: mistral-common.",
            )
        return self.template.encode(row)

    def prompt(self, row: Row) -> tuple[int, ...]:
        """Return the ids before the first token that the template marks as the last turn's."""
        encoded = self.encode(row)
        spans = [span for span in encoded.spans if span.role == "assistant"]
        if not spans:
            found = "the chat template does not mark where the assistant's turn begins"
            raise RowError(found, place=row.place)
        return encoded.input_ids[: min(span.start for span in spans if span.turn == spans[-1].turn)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the transformers tokenizer."""
        return str(self.tokenizer.fast.decode(list(ids), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        """Return the token in the vocabulary of the transformers tokenizer."""
        return str(self.tokenizer.fast.convert_ids_to_tokens(token))

    def shown(self, token: int) -> str:
        """Return the token for people."""
        piece = self.piece(token)
        letters = self._bytes_of_letters
        if token in self.tokenizer.fast.added_tokens_decoder or not all(letter in letters for letter in piece):
            return piece
        return spelled_bytes(bytes(letters[letter] for letter in piece))

    @cached_property
    def _bytes_of_letters(self) -> dict[str, int]:
        """The byte of each letter of a vocabulary of bytes; empty for any other vocabulary."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        if "ByteLevel" not in repr(self.tokenizer.fast.backend_tokenizer.decoder):
            return {}
        return {letter: byte for byte, letter in bytes_to_unicode().items()}

    def require(self, objective: Objective, place: Place) -> None:
        """Refuse an objective about a token that is not an added token of the transformers tokenizer."""
        if objective.without:
            objective.require(self.template.added_ids, self.file.name, place)

    @property
    def file(self) -> Path:
        """`tokenizer.json`; without one, the Mistral tokenizer file that the transformers tokenizer is made from."""
        converted, source = self.tokenizer.path / TOKENIZER_JSON, oracle_file(self.tokenizer.path)
        return source if source is not None and not converted.is_file() else converted

    @property
    def vocab_size(self) -> int:
        """Number of ids of the transformers tokenizer, added tokens included."""
        return len(self.tokenizer.fast)

    @property
    def eos_id(self) -> int:
        """Id of `</s>` in the transformers tokenizer."""
        return int(self.tokenizer.fast.eos_token_id)


def make_encoder(backend: str, tokenizer: CheckpointTokenizer, *, template: str | None = None) -> Encoder:
    """Return the backend of a name.

    Args:
        backend: `mistral-common` or `chat-template`.
        tokenizer: The tokenizer; it is loaded at the first use.
        template: Text of the chat template; None for the tokenizer's own. mistral-common has no use for it.
    """
    if backend == OracleEncoder.backend:
        return OracleEncoder(tokenizer)
    return TemplateEncoder(tokenizer, template)
