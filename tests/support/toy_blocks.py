"""Two types of chunks whose tokens are blocks that the package does not know: a sound in a row, and a map of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from pytest_mistral_lora.chat.chunks.chunk_type import BlockType, ChunkData, ImageSizes
from pytest_mistral_lora.chat.fields import check_text, error_at
from pytest_mistral_lora.places import Place


class Sound(BlockType):
    """A sound, a token for each second: `{"type": "sound", "sound": "sounds/a.wav", "seconds": 3}`."""

    name = title = "sound"
    importable = f"{__name__}:SOUND"
    keys = ("type", "sound", "seconds")
    measures = ("seconds",)
    block = ("[PREFIX]", "[MIDDLE]")
    count = "rows_with_sounds"
    tensors = ("input_features",)

    def check(self, chunk: ChunkData, place: Place) -> None:
        check_text(chunk.get("sound"), place / "sound")
        if type(chunk.get("seconds")) is not int or chunk["seconds"] < 1:
            raise error_at(place / "seconds", repr(chunk.get("seconds")), "seconds")

    def shown(self, chunk: ChunkData) -> str:
        return f"sound of {chunk['seconds']} s {chunk['sound']}"

    def assets(self, chunk: ChunkData) -> tuple[str, ...]:
        return (chunk["sound"],)

    def literals_of(self, chunk: ChunkData, sizes: ImageSizes) -> Sequence[str]:
        return ["[PREFIX]", *["[MIDDLE]"] * chunk["seconds"]]

    def read(self, literals: Sequence[str], sizes: ImageSizes) -> tuple[dict[str, Any], int]:
        seconds = len([*takewhile("[MIDDLE]".__eq__, literals[1:])])
        if not seconds:
            raise ValueError("a sound without a second")
        return {"type": self.name, "sound": "", "seconds": seconds}, seconds + 1


class Map(BlockType):
    """A map of tiles in rows, each row with its end: `{"type": "map", "rows": 2, "tiles": 3}`."""

    name = title = "map"
    importable = f"{__name__}:MAP"
    keys = ("type", "rows", "tiles")
    measures = ("rows", "tiles")
    block = ("[TOOL_CONTENT]", "[SUFFIX]")
    count = "rows_with_maps"

    def check(self, chunk: ChunkData, place: Place) -> None:
        for key in self.measures:
            if type(chunk.get(key)) is not int or chunk[key] < 1:
                raise error_at(place / key, repr(chunk.get(key)), "a number from 1 on")

    def literals_of(self, chunk: ChunkData, sizes: ImageSizes) -> Sequence[str]:
        return [*["[TOOL_CONTENT]"] * chunk["tiles"], "[SUFFIX]"] * chunk["rows"]

    def read(self, literals: Sequence[str], sizes: ImageSizes) -> tuple[dict[str, Any], int]:
        tiles = literals.index("[SUFFIX]") if "[SUFFIX]" in literals else 0
        line = [*["[TOOL_CONTENT]"] * tiles, "[SUFFIX]"]
        rows = 0
        while tiles and [*literals[rows * len(line) : (rows + 1) * len(line)]] == line:
            rows += 1
        if not rows:
            raise ValueError("a map without a whole row")
        return {"type": self.name, "rows": rows, "tiles": tiles}, rows * len(line)


SOUND, MAP = Sound(), Map()
