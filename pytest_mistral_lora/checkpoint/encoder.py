"""How a row becomes ids in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pytest_mistral_lora.chat.encoded import EncodedRow
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.render import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import TOKENIZER_JSON, CheckpointTokenizer, oracle_file
from pytest_mistral_lora.errors import RowError


@dataclass(frozen=True)
class Encoder:
    """The backend of a run: how a row becomes ids.

    Attributes:
        backend: `mistral-common` or `chat-template`.
        tokenizer: The base model's tokenizer.
    """

    backend: str
    tokenizer: CheckpointTokenizer

    def encode(self, row: Row) -> EncodedRow:
        """Encode a row with labels.

        Raises:
            RowError: If the backend refuses the row, cannot label it, or would take its text for control tokens.
        """
        if self.backend == "mistral-common":
            return self.tokenizer.oracle.encode(row)
        literals = self.template.control_literals(row)
        if literals:
            raise RowError(
                f"the text spells control tokens ({', '.join(literals)}), which this backend would encode as such",
                place=row.place,
                next_step="Change the text, or train with backend: mistral-common.",
            )
        encoded: EncodedRow = self.template.encode(row)
        return encoded

    def prompt(self, row: Row) -> tuple[int, ...]:
        """Return the ids that the row's last assistant turn follows, as at inference.

        Raises:
            RowError: If the backend refuses the row or cannot tell where the turn begins.
        """
        if self.backend == "mistral-common":
            return self.tokenizer.oracle.encode_prompt(row)
        encoded = self.encode(row)
        spans = [span for span in encoded.spans if span.role == "assistant"]
        if not spans:
            raise RowError("the chat template does not say where the assistant's turn begins", place=row.place)
        return encoded.input_ids[: min(span.start for span in spans if span.turn == spans[-1].turn)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return ids as text, without control tokens."""
        if self.backend == "mistral-common":
            return self.tokenizer.oracle.decode(list(ids))
        return str(self.tokenizer.fast.decode(list(ids), skip_special_tokens=True))

    def piece(self, token: int) -> str:
        """Return one token as it is written in the vocabulary."""
        if self.backend == "mistral-common":
            return self.tokenizer.oracle.piece(token)
        return str(self.tokenizer.fast.convert_ids_to_tokens(token))

    @property
    def file(self) -> Path:
        """The tokenizer file that decides its ids."""
        own, converted = oracle_file(self.tokenizer.path), self.tokenizer.path / TOKENIZER_JSON
        through_own = self.backend == "mistral-common" or not converted.is_file()
        return own if own is not None and through_own else converted

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.tokenizer.oracle.vocab_size if self.backend == "mistral-common" else len(self.tokenizer.fast)

    @property
    def eos_id(self) -> int:
        """Id of `</s>`."""
        return (
            self.tokenizer.oracle.eos_id if self.backend == "mistral-common" else int(self.tokenizer.fast.eos_token_id)
        )

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the backend `chat-template`."""
        return ChatTemplate(self.tokenizer.fast)
