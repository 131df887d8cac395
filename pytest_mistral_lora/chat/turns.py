"""The turns of an encoded row, and what a tokenizer does for the kinds that encode rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

Part = tuple[str | None, tuple[int, ...]]
"""A text with its tokens, or None with one control token. Plain tuples: a dataset has millions of them."""

_Prepared = TypeVar("_Prepared")


class Turn(NamedTuple):
    """A turn, split into its texts and control tokens.

    Attributes:
        role: Role of the message.
        ids: Its tokens.
        parts: Runs of them, in order, that were encoded in one go: text and tokens, or None and one control token.
    """

    role: str
    ids: tuple[int, ...]
    parts: list[Part]


class Tokenization(Protocol):
    """What a kind of record asks a tokenizer: the part of `Oracle` that encodes rows stands on.

    Attributes:
        version: The tokenizer version.
        kind: `spm` or `tekken`.
        bos_id: Id of `<s>`.
        eos_id: Id of `</s>`.
    """

    version: str
    kind: Literal["spm", "tekken"]
    bos_id: int
    eos_id: int

    @property
    def control_ids(self) -> Mapping[str, int]:
        """The id of each control token by its literal."""

    def chat_turns(self, row: Any, *, as_prompt: bool = False) -> list[Turn]:
        """Return the turns of a conversation after BOS."""

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Encode bare text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, leaving control tokens out."""

    def traced_ids(self, role: str, encode: Callable[[Any], Iterable[int]]) -> list[int]:
        """Return the ids that a kind's own encoding gives."""

    def prepared(self, prepare: Callable[[Any], _Prepared]) -> _Prepared:
        """Return what a kind prepares for this tokenizer, which is prepared once."""
