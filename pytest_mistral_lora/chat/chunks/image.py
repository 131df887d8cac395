"""Chunks of pictures: `{"type": "image_url", "image_url": {"url": ...}, "width": ..., "height": ...}`.

A picture becomes a grid of tokens: `[IMG]` for each column, and a break behind each line, of which the last is the end.
The grid is made of the size of the picture alone, which its header tells; no pixel is read, and nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.chunks.chunk_type import BlockType, ChunkData, ImageSizes
from pytest_mistral_lora.chat.fields import check_text, error_at, kind_of
from pytest_mistral_lora.chat.reading.pictures import Picture, picture_in
from pytest_mistral_lora.errors import UncheckedRowError
from pytest_mistral_lora.places import Place, file_of

PUBLISHED = (ImageSizes(16, 1024, 1), ImageSizes(14, 1540, 2), ImageSizes(14, 1540, 1), ImageSizes(14, 1024, 1))
"""Those of Pixtral and of Small 3.1 and later; then Small's without its merge, and Pixtral's with smaller patches."""


class Grid(NamedTuple):
    """The tokens of a picture.

    Attributes:
        columns: Number of tokens in a line, without the break behind them.
        lines: Number of lines.
    """

    columns: int
    lines: int

    @property
    def literals(self) -> list[str]:
        """The control tokens, in order."""
        line = ["[IMG]"] * self.columns
        return [*[*line, "[IMG_BREAK]"] * (self.lines - 1), *line, "[IMG_END]"]


def grid_of(width: int, height: int, sizes: ImageSizes) -> Grid:
    """Return the grid of a picture as mistral-common cuts it (`ImageEncoder._image_to_num_tokens`).

    Args:
        width: The width of the picture, in pixels.
        height: Its height.
        sizes: How the tokenizer cuts images.
    """
    ratio = max(width / sizes.longest, height / sizes.longest)
    if ratio > 1:
        width, height = max(round(width / ratio), 1), max(round(height / ratio), 1)
    return _cut(width, height, sizes)


def grid_of_transformers(width: int, height: int, sizes: ImageSizes) -> Grid:
    """Return the grid of a picture as transformers cuts it: a side that is scaled down is rounded down.

    The height or the width is 0 if a very long picture is scaled (`get_resize_output_image_size` of Pixtral).
    """
    ratio = max(width / sizes.longest, height / sizes.longest)
    if ratio > 1:
        width, height = int(width // ratio), int(height // ratio)
    return _cut(width, height, sizes)


def _cut(width: int, height: int, sizes: ImageSizes) -> Grid:
    side = sizes.patch * sizes.merge
    return Grid((width - 1) // side + 1, (height - 1) // side + 1)


class Image(BlockType):
    """A picture, whose size is in its header or beside it."""

    name = "image_url"
    title = "image"
    importable = f"{__name__}:IMAGE"
    keys = ("type", "image_url", "width", "height")
    foreign_names = ("image", "input_image")
    order = 20
    count = "rows_with_images"
    measures = ("width", "height")
    block = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    lost = "a picture is lost, or written as text"
    tensors = ("pixel_values",)
    id_keys = ("image_token_id", "image_token_index")

    def check(self, chunk: ChunkData, place: Place) -> None:
        """Check the URL and the size.

        Raises:
            RowError: At the first value that cannot be used.
        """
        value = chunk.get("image_url")
        if isinstance(value, Mapping):
            for key in value:
                if key not in ("url", "detail"):
                    raise error_at(place / "image_url" / str(key), "unknown field", "url")
            check_text(value.get("url"), place / "image_url" / "url")
        else:
            check_text(value, place / "image_url")
        given = [key for key in ("width", "height") if key in chunk]
        if len(given) == 1:
            raise error_at(place, f"{given[0]} alone", "width and height, or neither")
        for key in given:
            if type(chunk[key]) is not int or chunk[key] < 1:
                found = repr(chunk[key]) if isinstance(chunk[key], int | float) else f"is {kind_of(chunk[key])}"
                raise error_at(place / key, found, "a number of pixels")

    def shown(self, chunk: ChunkData) -> str:
        """Return the size and the file of a picture."""
        url = _url(chunk)
        name = "in the row" if url.startswith("data:") else url
        return " ".join(filter(None, ("image", _size_words(chunk), name)))

    def assets(self, chunk: ChunkData) -> tuple[str, ...]:
        """Return the path of the picture; nothing for one in the row, or at a URL."""
        return () if _is_url(_url(chunk)) else (_url(chunk),)

    def from_foreign(self, chunk: ChunkData, value: Any) -> dict[str, Any]:
        """Return the chunk of a picture that stands under another key."""
        given = chunk.get("image_url") or chunk.get("image") or chunk.get("path") or chunk.get("url") or value
        return {"type": self.name, "image_url": given, **{k: chunk[k] for k in ("width", "height") if k in chunk}}

    def measured(self, chunk: ChunkData, place: Place) -> ChunkData:
        """Return a chunk with the size of its picture.

        Raises:
            UncheckedRowError: If the picture is not here, and no size stands beside it.
            RowError: If it cannot be read as a picture, or has another size than stands beside it.
        """
        picture = self.picture(chunk, place)
        if picture is None:
            return chunk
        if "width" in chunk and (chunk["width"], chunk["height"]) != picture[:2]:
            found = f"{_size_words(chunk)}, and the picture has {picture.width}x{picture.height}"
            raise error_at(place / "width", found, "the size of the picture, or none")
        return {**chunk, "width": picture.width, "height": picture.height}

    def picture(self, chunk: ChunkData, place: Place) -> Picture | None:
        """Return what the header of a picture says; None if it is not here, and its size stands beside it.

        Raises:
            UncheckedRowError: If the picture is not here, and no size stands beside it.
            RowError: If it cannot be read as a picture.
        """
        url, file = _url(chunk), file_of(place)
        folder = Path(file).absolute().parent if file else None
        where = place / "image_url"
        if url.startswith("data:") or (folder is not None and not _is_url(url)):
            found = picture_in(url, folder, where)
            if isinstance(found, Picture):
                return found
        else:
            found = "it is at a URL, which is not fetched" if _is_url(url) else "no file tells its folder"
        if "width" in chunk:
            return None
        raise UncheckedRowError(
            f"the size of {self.shown(chunk)!r:.200} is not known: {found}",
            reason="image of unknown size",
            place=place,
            next_step="Write width and height, in pixels, beside its URL, or put it into the folder of the dataset.",
        )

    def literals_of(self, chunk: ChunkData, sizes: ImageSizes) -> Sequence[str]:
        """Return the control tokens of the grid."""
        return grid_of(chunk["width"], chunk["height"], sizes).literals

    def difference(self, chunk: ChunkData, literals: Sequence[str], sizes: ImageSizes) -> str:
        """Return the grid that some control tokens are, that of the picture, and the settings that cut it so."""
        size = chunk["width"], chunk["height"]
        try:
            read, _ = self.read(literals, sizes)
        except ValueError as error:
            return f"{self.shown(chunk)} is {error}"
        found, expected = grid_of(read["width"], read["height"], sizes), grid_of(*size, sizes)
        words = f"{self.shown(chunk)} is {found.columns}x{found.lines} tokens, and not "
        words += f"{expected.columns}x{expected.lines}"
        if found == grid_of_transformers(*size, sizes):
            return f"{words}: a side that is scaled down is rounded down"
        other = next((other for other in PUBLISHED if found == grid_of(*size, other)), None)
        if other is None:
            return words
        return f"{words}: cut by patches of {other.patch}, {other.merge} to a token, up to {other.longest} pixels"

    def read(self, literals: Sequence[str], sizes: ImageSizes) -> tuple[dict[str, Any], int]:
        """Return a picture of the grid at the beginning of some control tokens, and the length of the grid.

        Raises:
            ValueError: If a line differs from the first, or the end is missing.
        """
        lines: list[int] = []
        at = columns = 0
        for at, literal in enumerate(literals):
            if literal == "[IMG]":
                columns += 1
                continue
            if literal not in self.block:
                break
            lines.append(columns)
            if columns != lines[0] or not columns:
                raise ValueError(f"line {len(lines)} of a grid has {columns} [IMG], and the first has {lines[0]}")
            columns = 0
            if literal == "[IMG_END]":
                side = sizes.patch * sizes.merge
                width, height = (min(tokens * side, sizes.longest) for tokens in (lines[0], len(lines)))
                chunk = {"type": self.name, "image_url": {"url": ""}, "width": width, "height": height}
                if grid_of(width, height, sizes) != (lines[0], len(lines)):
                    raise ValueError(f"a grid of {lines[0]}x{len(lines)} tokens is larger than any picture becomes")
                return chunk, at + 1
        raise ValueError(f"a grid without [IMG_END] behind {len(lines)} whole lines")


def _url(chunk: ChunkData) -> str:
    value = chunk["image_url"]
    return str(value["url"] if isinstance(value, Mapping) else value)


def _is_url(url: str) -> bool:
    """Return whether a text is a URL, and no path; one of `file` is, too."""
    scheme, colon, _ = url.partition(":")
    # a letter alone is a drive of Windows
    return bool(colon) and len(scheme) > 1 and scheme.replace("+", "").isalnum()


def _size_words(chunk: ChunkData) -> str:
    return f"{chunk['width']}x{chunk['height']}" if "width" in chunk else ""


IMAGE = Image()
