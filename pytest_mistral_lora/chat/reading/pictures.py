"""Read the size of a picture from its header, in a process of its own: no pixel is decoded, and nothing is fetched."""

from __future__ import annotations

import atexit
import base64
import binascii
import io
import os
import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.reading import limited
from pytest_mistral_lora.errors import RowError, one_line
from pytest_mistral_lora.places import Place

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""The formats whose headers are read, by Pillow's names."""
MAX_BYTES = 64 << 20
"""The most bytes of a picture."""
MAX_PIXELS = 178_956_970
"""The most pixels: Pillow, and with it mistral-common, opens no larger one."""
_CPU_SECONDS = 5.0
_SECONDS = 60.0
_MEMORY = 512 << 20
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
        return _picture({"data": text}, place)
    try:
        path = (Path(os.sep) if folder is None else folder).joinpath(url).resolve()
        if folder is None or Path(url).is_absolute() or not path.is_relative_to(folder.resolve()):
            return "it is outside of the folder of the dataset, and not opened"
        if not path.is_file():
            # a trainer may have another folder for pictures
            return "there is no such file"
        status = path.stat()
    except (OSError, ValueError) as error:
        raise RowError(f"{url!r:.200} cannot be opened: {one_line(error)}", place=place) from error
    if status.st_size > MAX_BYTES:
        return f"it has {status.st_size:,} bytes, more than {MAX_BYTES:,}"
    return _of_file(str(path), status.st_mtime_ns, status.st_size, place)


def _of_file(path: str, modified: int, size: int, place: Place) -> Picture | str:
    found = _header(path, modified, size)
    return _checked(found, place)


@lru_cache(maxsize=4096)
def _header(path: str, modified: int, size: int) -> tuple[tuple[str, Any], ...]:
    """Return the answer on a file, which many rows may name."""
    return tuple(_asked({"path": path}).items())


def _picture(question: Mapping[str, Any], place: Place) -> Picture | str:
    return _checked(tuple(_asked(question).items()), place)


def _checked(answer: tuple[tuple[str, Any], ...], place: Place) -> Picture | str:
    found = dict(answer)
    if "found" in found:
        raise RowError(found["found"], place=place, expected=f"a picture in {', '.join(FORMATS)}")
    return Picture(found["width"], found["height"], found["orientation"])


_started: dict[int, limited.LimitedProcess] = {}
"""The process of each process: a forked one must not share the pipes of its parent."""


def _asked(question: Mapping[str, Any]) -> dict[str, Any]:
    process = _started.get(os.getpid())
    if process is None or not process.is_running:
        check = "import PIL.Image"
        title = "reads the headers of pictures"
        process = limited.LimitedProcess(__name__, "serve", (), title=title, check=check)
        _started[os.getpid()] = process
    try:
        answer = process.answer(question, _SECONDS)
    except BaseException:
        # an unread answer would be taken for that to the next question
        _close()
        raise
    if answer is None or answer.get("kind") == "memory":
        overrun = process.overrun(_CPU_SECONDS, _SECONDS)
        _close()
        found = f"takes more than {overrun} to read" if overrun else "takes down the reader of pictures"
        return {"found": f"a picture that {found}"}
    return answer


def _close() -> None:
    process = _started.pop(os.getpid(), None)
    if process is not None:
        process.end()


atexit.register(_close)


def serve() -> None:
    """Answer questions on pictures, in the other process."""
    limited.serve(_prepare, _answer, cpu_seconds=_CPU_SECONDS, memory=_MEMORY)


def _prepare() -> None:
    from PIL import Image, WebPImagePlugin  # noqa: F401  # it registers its format

    Image.preinit()
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
        return {"found": f"cannot be read as a picture: {one_line(error) or type(error).__name__}"}
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        return {"found": f"a picture of {width}x{height} pixels"}
    return {"width": width, "height": height, "orientation": orientation if isinstance(orientation, int) else 1}
