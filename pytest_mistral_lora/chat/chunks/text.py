"""Chunks of text: `{"type": "text", "text": ...}`."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.chat.chunks.chunk_type import ChunkData, ChunkType
from pytest_mistral_lora.chat.fields import check_text
from pytest_mistral_lora.places import Place


class Text(ChunkType):
    """A text: neighbours are joined."""

    name = "text"
    importable = f"{__name__}:TEXT"
    keys = ("type", "text")
    foreign_names = ("input_text", "output_text")
    order = 0

    def check(self, chunk: ChunkData, place: Place) -> None:
        """Check the text.

        Raises:
            RowError: If it is not a text that UTF-8 can hold.
        """
        check_text(chunk.get("text"), place / "text")

    def text(self, chunk: ChunkData) -> str:
        """Return the text."""
        return str(chunk["text"])

    def from_foreign(self, chunk: ChunkData, value: Any) -> dict[str, Any]:
        """Return the chunk of a text."""
        return {"type": "text", "text": value}


TEXT = Text()
