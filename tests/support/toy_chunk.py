"""A type of chunk that the package does not know: an aside, which a model reads and writes in brackets."""

from __future__ import annotations

from pytest_mistral_lora.chat.chunks.chunk_type import ChunkData, ChunkType
from pytest_mistral_lora.chat.fields import check_text, error_at
from pytest_mistral_lora.places import Place


class Aside(ChunkType):
    """An aside: `{"type": "aside", "aside": ..., "whispered": true}`."""

    name = "aside"
    importable = f"{__name__}:ASIDE"
    keys = ("type", "aside", "whispered")
    roles = ("user", "assistant")
    whose = "the user or the assistant"
    count = "rows_with_asides"

    def check(self, chunk: ChunkData, place: Place) -> None:
        check_text(chunk.get("aside"), place / "aside")
        if not isinstance(chunk.get("whispered", False), bool):
            raise error_at(place / "whispered", repr(chunk["whispered"]), "true or false")

    def text(self, chunk: ChunkData) -> str:
        return f"({chunk['aside']})"

    def native(self, chunk: ChunkData) -> ChunkData:
        return {"type": "text", "text": self.text(chunk)}


ASIDE = Aside()
