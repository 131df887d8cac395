"""What every type of chunk answers: how it is checked, encoded and read as a part of an answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.versions import VersionFacts

ChunkData = Mapping[str, Any]


class ChunkType(ABC):
    """A type of chunk: an object that answers what the rest of the package asks about chunks.

    Attributes:
        name: The value of `type`.
        importable: The importable name of the object, `package.module:ATTRIBUTE`, by which other processes find it.
        keys: The keys of a chunk.
        roles: The roles whose messages may have it.
        whose: These roles in words; empty if every role may have it.
        foreign_names: What other programs have in `type` for it.
        order: Types of a lower order are named first.
        is_thought: Whether a client gets it as thinking, apart from the text.
        literals: The control tokens that stand around the text of a chunk.
        lost: What has happened to a row whose ids lack the first of them, in words.
        count: The name of the count of rows that have it in statistics, `rows_with_...`; empty if they are not counted.
    """

    name: ClassVar[str]
    importable: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    roles: ClassVar[tuple[str, ...]] = ("system", "user", "assistant", "tool")
    whose: ClassVar[str] = ""
    foreign_names: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[int] = 100
    is_thought: ClassVar[bool] = False
    literals: ClassVar[tuple[str, ...]] = ()
    lost: ClassVar[str] = ""
    count: ClassVar[str] = ""

    @abstractmethod
    def check(self, chunk: ChunkData, place: Place) -> None:
        """Check the values of a chunk, whose keys are known.

        Raises:
            RowError: At the first value that cannot be used.
        """

    @abstractmethod
    def text(self, chunk: ChunkData) -> str:
        """Return the text that the tokens of a chunk spell."""

    def native(self, chunk: ChunkData) -> ChunkData:
        """Return a chunk as mistral-common and chat templates take it: a text, or a chunk of another type of theirs."""
        return chunk

    def from_foreign(self, chunk: ChunkData, value: Any) -> dict[str, Any]:
        """Return the chunk of one that another program wrote.

        Args:
            chunk: The chunk, without nulls.
            value: The value of its text, which may be under another key.
        """
        kept = {key: chunk[key] for key in self.keys if key in chunk}
        return {**kept, "type": self.name}

    def markers(self, chunk: ChunkData) -> tuple[str, ...]:
        """Return the control tokens that stand around its text: some of `literals`."""
        return self.literals

    def is_written_by(self, facts: VersionFacts) -> bool:
        """Return whether tokenizers of a version write its `literals`, if the vocabulary has them."""
        return False

    def from_ids(self, text: str, *, closed: bool) -> dict[str, Any]:
        """Return the chunk of a text that stands behind the first of its `literals` in ids.

        Args:
            text: The text.
            closed: Whether the last of them follows the text.
        """
        raise NotImplementedError(f"{self.name} has no control tokens")

    def is_closed(self, chunk: ChunkData) -> bool:
        """Return whether a marker, or nothing at all, ends a chunk."""
        return True

    def is_in(self, content: Any) -> bool:
        """Return whether a checked `content` has a chunk of this type."""
        return not isinstance(content, str | None) and any(chunk["type"] == self.name for chunk in content)
