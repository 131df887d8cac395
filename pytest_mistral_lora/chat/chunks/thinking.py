"""Chunks of thinking: `{"type": "thinking", "thinking": ..., "closed": true}`, between `[THINK]` and `[/THINK]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.chunks.chunk_type import ChunkData, ChunkType
from pytest_mistral_lora.chat.fields import check_text, error_at, kind_of
from pytest_mistral_lora.chat.remedies import import_command
from pytest_mistral_lora.places import Place

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.versions import VersionFacts


class Thought(ChunkType):
    """A thought, which may be left open."""

    name = "thinking"
    importable = f"{__name__}:THINKING"
    keys = ("type", "thinking", "closed")
    roles = ("assistant", "system")
    whose = "the assistant or the system"
    foreign_names = ("reasoning",)
    order = 10
    is_thought = True
    literals = opens, closes = "[THINK]", "[/THINK]"
    lost = "the thinking is lost, or written as text"
    count = "rows_with_thinking"

    def chunk(self, text: str, *, closed: bool = True) -> dict[str, Any]:
        """Return a chunk; one that is closed does not say so."""
        return {"type": self.name, "thinking": text, **({} if closed else {"closed": False})}

    def check(self, chunk: ChunkData, place: Place) -> None:
        """Check the text, and whether it is closed.

        Raises:
            RowError: At the first value that cannot be used.
        """
        if isinstance(chunk.get("thinking"), list):
            # Mistral's API returns thinking in this form
            step = f"To join its texts: {import_command(place)}"
            raise error_at(place / "thinking", "is a list of chunks", "a string", step)
        check_text(chunk.get("thinking"), place / "thinking")
        if not isinstance(chunk.get("closed", True), bool):
            raise error_at(place / "closed", f"is {kind_of(chunk['closed'])}", "true or false")

    def text(self, chunk: ChunkData) -> str:
        """Return the thought."""
        return str(chunk["thinking"])

    def from_foreign(self, chunk: ChunkData, value: Any) -> dict[str, Any]:
        """Return the chunk of a thought, as one text if it is a list of text chunks, as in Mistral's API."""
        parts = value if isinstance(value, list | tuple) else ()
        texts = [part["text"] for part in parts if isinstance(part, Mapping) and part.keys() == {"type", "text"}]
        is_text = len(texts) == len(parts) and all(isinstance(text, str) for text in texts)
        closed = {"closed": chunk["closed"]} if "closed" in chunk else {}
        return {"type": self.name, "thinking": "".join(texts) if parts and is_text else value, **closed}

    def markers(self, chunk: ChunkData) -> tuple[str, ...]:
        """Return the markers around a thought; one that is left open has the first alone."""
        return self.literals if self.is_closed(chunk) else (self.opens,)

    def is_written_by(self, facts: VersionFacts) -> bool:
        """Return whether answers of a version may have thoughts."""
        return facts.thinking

    def from_ids(self, text: str, *, closed: bool) -> dict[str, Any]:
        """Return the chunk of a thought."""
        return self.chunk(text, closed=closed)

    def is_closed(self, chunk: ChunkData) -> bool:
        """Return whether `[/THINK]` ends a thought."""
        return chunk.get("closed") is not False


THINKING = Thought()
