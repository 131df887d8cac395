"""What every type of chunk answers: how it is checked and encoded, and how it is read back from ids."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.versions import VersionFacts

ChunkData = Mapping[str, Any]

_BLOCK = "mistral-lora:"


class ImageSizes(NamedTuple):
    """How an image becomes tokens: one for each square of `merge` by `merge` patches.

    Attributes:
        patch: The side of a patch, in pixels.
        longest: The longest side of an image, in pixels: larger ones are scaled down.
        merge: The patches of a token, along each side.
    """

    patch: int
    longest: int
    merge: int


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
        block: The control tokens that its tokens are; the first one opens it. Empty if its tokens spell a text. No
            token of a block has a loss, whatever the objective is.
        tensors: The keys of a trainer's batch that hold what its block stands for.
        id_keys: The keys of the id that opens its block, in the configurations of models.
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
    block: ClassVar[tuple[str, ...]] = ()
    tensors: ClassVar[tuple[str, ...]] = ()
    id_keys: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def check(self, chunk: ChunkData, place: Place) -> None:
        """Check the values of a chunk, whose keys are known.

        Raises:
            RowError: At the first value that cannot be used.
        """

    @abstractmethod
    def text(self, chunk: ChunkData) -> str:
        """Return the text that the tokens of a chunk spell."""

    def shown(self, chunk: ChunkData) -> str:
        """Return a chunk as people read it."""
        return self.text(chunk)

    def native(self, chunk: ChunkData) -> ChunkData:
        """Return a chunk as mistral-common and chat templates take it: a text, or a chunk of another type of theirs."""
        return chunk

    def assets(self, chunk: ChunkData) -> tuple[str, ...]:
        """Return the files that a chunk names, relative to the folder of its dataset."""
        return ()

    def measured(self, chunk: ChunkData, place: Place) -> ChunkData:
        """Return a checked chunk with the measures that its ids are made of, such as the size of a picture.

        Raises:
            UncheckedRowError: If a measure is not known here.
            RowError: If an asset cannot be used.
        """
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


class BlockType(ChunkType):
    """A type whose tokens are a block of control tokens, which is made of measures: an input that is not trained on.

    mistral-common puts its blocks where it puts images.

    Attributes:
        title: What it is, in sentences.
        measures: The keys of a chunk that its block is made of.
    """

    title: ClassVar[str]
    measures: ClassVar[tuple[str, ...]]
    roles = ("user",)
    whose = "the user"

    def text(self, chunk: ChunkData) -> str:
        """Return the empty text."""
        return ""

    def native(self, chunk: ChunkData) -> ChunkData:
        """Return a chunk of an image whose URL spells the measures of the chunk, and no path: nothing opens it."""
        measured = {key: chunk[key] for key in self.measures if key in chunk}
        return {"type": "image_url", "image_url": {"url": f"{_BLOCK}{json.dumps({'type': self.name, **measured})}"}}

    def unencoded_by(self, sizes: ImageSizes | None) -> str:
        """Return why a tokenizer has no such block; empty if it has.

        Args:
            sizes: How the tokenizer cuts images; None if it takes none.
        """
        return "" if sizes is not None else "the tokenizer file has no settings of images"

    @abstractmethod
    def literals_of(self, chunk: ChunkData, sizes: ImageSizes) -> Sequence[str]:
        """Return the control tokens of a measured chunk, in order.

        Args:
            chunk: The chunk.
            sizes: How the tokenizer cuts images.
        """

    def difference(self, chunk: ChunkData, literals: Sequence[str], sizes: ImageSizes) -> str:
        """Return how other control tokens differ from the block of a measured chunk, in words.

        Args:
            chunk: The chunk.
            literals: The control tokens.
            sizes: How the tokenizer cuts images.
        """
        expected = len(self.literals_of(chunk, sizes))
        return f"{self.shown(chunk)} is {len(literals)} tokens, and not {expected}"

    @abstractmethod
    def read(self, literals: Sequence[str], sizes: ImageSizes) -> tuple[dict[str, Any], int]:
        """Return a chunk that becomes the block at the beginning of some control tokens, and the length of the block.

        Args:
            literals: The control tokens, the first of which opens a block.
            sizes: How the tokenizer cuts images.

        Raises:
            ValueError: If they are no whole block, with what is wrong.
        """


def chunk_of_block(url: str) -> ChunkData | None:
    """Return the type and the measures of the chunk that the URL of a native chunk spells; None for any other URL."""
    return dict(json.loads(url.removeprefix(_BLOCK))) if url.startswith(_BLOCK) else None
