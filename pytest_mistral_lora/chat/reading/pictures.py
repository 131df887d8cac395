"""Read the size of a picture from its header, in a process of its own: no pixel is decoded, and nothing is fetched."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.reading import limited
from pytest_mistral_lora.chat.reading.limited import KeptProcess, LimitedProcess, Limits
from pytest_mistral_lora.errors import RowError, one_line
from pytest_mistral_lora.places import Place

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""The formats whose headers are read, by Pillow's names."""
MAX_BYTES = 64 << 20
"""The most bytes of a picture."""
MAX_PIXELS = 178_956_970
"""The most pixels: Pillow, and with it mistral-common, opens no larger one."""
_ORIENTATION = 274


class Picture(NamedTuple):
    """What the header of a picture says.

    Attributes:
        width: In pixels.
        height: In pixels.
        orientation: The orientation in its EXIF data; 1 if it is to be shown as it is stored.
    """

    width: int
    height: int
    orientation: int


def picture_in(url: str, folder: Path | None, place: Place) -> Picture | str:
    """Return what the header of a picture says, or why it is not read.

    Args:
        url: A data URL, or a path.
        folder: The folder of the dataset, out of which no path leads.
        place: The place of the URL.

    Raises:
        RowError: If it is no picture of `FORMATS`.
    """
    if url.startswith("data:"):
        head, comma, text = url.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RowError("a data URL that is not in base64", place=place, expected="data:image/png;base64,…")
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise RowError(f"a data URL whose base64 is damaged: {error}", place=place) from error
        if len(data) > MAX_BYTES:
            return f"it has {len(data):,} bytes, more than {MAX_BYTES:,}"
        return _picture(_reader().ask({"data": text}), place)
    try:
        outside = "it is outside of the folder of the dataset, and not opened"
        if folder is None or Path(url).is_absolute():
            return outside
        path = folder.joinpath(url).resolve()
        if not path.is_relative_to(folder.resolve()):
            return outside
        if not path.is_file():
            # a trainer may have another folder for pictures
            return "there is no such file"
        status = path.stat()
    except (OSError, ValueError) as error:
        raise RowError(f"{url!r:.200} cannot be opened: {one_line(error)}", place=place) from error
    if status.st_size > MAX_BYTES:
        return f"it has {status.st_size:,} bytes, more than {MAX_BYTES:,}"
    return _picture(_header_of(str(path), status.st_mtime_ns, status.st_size), place)


@lru_cache(maxsize=4096)
def _header_of(path: str, modified: int, size: int) -> Mapping[str, Any]:
    """Return the answer on a file, which many rows may name."""
    return _reader().ask({"path": path})


def _picture(header: Mapping[str, Any], place: Place) -> Picture:
    if "found" in header:
        found = f"a picture that {header['found']}"
        raise RowError(found, place=place, expected=f"a picture in {', '.join(FORMATS)}")
    return Picture(header["width"], header["height"], header["orientation"])


@cache
def _reader() -> KeptProcess:
    """Return the process of this session for headers of pictures."""
    title, check = "reads the headers of pictures", "import PIL.Image"
    return KeptProcess(lambda: LimitedProcess(__name__, "serve", (), title=title, check=check), Limits())


def serve() -> None:
    """Answer questions on pictures, in the other process."""
    limits = Limits()
    limited.serve(_prepare, _answer, cpu_seconds=limits.cpu_seconds, memory=limits.memory)


def _prepare() -> None:
    from PIL import Image

    Image.preinit()
    # the only one of the formats that `preinit` does not register
    import_module("PIL.WebPImagePlugin")
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    warnings.simplefilter("ignore")


def _answer(question: Mapping[str, Any]) -> tuple[Mapping[str, Any], bytes]:
    return _read_header(question), b""


def _read_header(question: Mapping[str, Any]) -> dict[str, Any]:
    from PIL import Image

    source = question["path"] if "path" in question else io.BytesIO(base64.b64decode(question["data"]))
    try:
        with Image.open(source, formats=FORMATS) as image:
            width, height = image.size
            exif = Image.Exif()
            # `getexif` of a PNG would decode its pixels to reach what stands behind them
            exif.load(image.info.get("exif") or b"")
            orientation = exif.get(_ORIENTATION)
    except MemoryError:
        raise
    except Exception as error:
        return {"found": f"cannot be read: {one_line(error) or type(error).__name__}"}
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        return {"found": f"has {width}x{height} pixels"}
    return {"width": width, "height": height, "orientation": orientation if isinstance(orientation, int) else 1}
