"""How a file holds its records, as its first bytes show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pytest_mistral_lora.errors import InputError

LINES = "JSON Lines"
ARRAY = "a JSON array"
VALUES = "JSON objects over several lines"
PARQUET = "Parquet"
ARROW_FILE = "an Arrow file"
ARROW_STREAM = "an Arrow stream"
CSV = "CSV"
TSV = "TSV"
UTF8_BOM = b"\xef\xbb\xbf"

_COMPRESSED = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
# UTF-32 before UTF-16: its mark begins with the mark of UTF-16
_ENCODED = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
    b"{\x00": "UTF-16-LE",
    b"[\x00": "UTF-16-LE",
    b"\x00{": "UTF-16-BE",
    b"\x00[": "UTF-16-BE",
}
_TABLES = {b"PAR1": PARQUET, b"ARROW1": ARROW_FILE, b"\xff\xff\xff\xff": ARROW_STREAM}
_UNREADABLE = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the data", "Fetch the data: git lfs pull"),
    b"PK\x03\x04": ("a zip archive", "Unpack it; save a spreadsheet as CSV."),
    b"\x80\x04\x95": ("a Python pickle, which can run code", "Save the data as JSON Lines or Parquet."),
    b"SQLite format 3": ("an SQLite database", "Export its table as CSV."),
    b"FEA1": ("Feather version 1", "Save it as Parquet or Arrow."),
    b"<!DOCTYPE": ("a web page, not the data", "Download the file itself."),
    b"<html": ("a web page, not the data", "Download the file itself."),
}


@dataclass(frozen=True, slots=True)
class Container:
    """How a file holds its records.

    Attributes:
        name: `LINES`, `ARRAY`, `VALUES`, `PARQUET`, `ARROW_FILE`, `ARROW_STREAM`, `CSV` or `TSV`; empty if it is
            not known before the file is decompressed or decoded.
        compression: `gzip`, `zstd`, `bzip2`, `xz`, or empty.
        encoding: `UTF-16` or the like; empty for UTF-8.
    """

    name: str = ""
    compression: str = ""
    encoding: str = ""

    @property
    def is_packed(self) -> bool:
        """Whether it is compressed by a program other than gzip, which must unpack it first."""
        return self.compression not in ("", "gzip")

    @property
    def title(self) -> str:
        """The container in words, `gzip`, `UTF-16` or `a JSON array`."""
        return self.compression or self.encoding or self.name


def container_of(head: bytes, path: Path) -> Container:
    """Return the container of a file by its first bytes.

    Args:
        head: The first bytes, a few thousand or the whole file.
        path: The file: its suffix shows CSV and TSV, which have no mark of their own.

    Raises:
        InputError: If it is a known format that is never read, such as a zip archive.
    """
    for mark, (title, step) in _UNREADABLE.items():
        if head.startswith(mark):
            raise InputError(f"this is {title}", place=str(path), expected="rows", next_step=step)
    for mark, name in _COMPRESSED.items():
        if head.startswith(mark):
            return Container(compression=name)
    for mark, name in _TABLES.items():
        if head.startswith(mark):
            return Container(name)
    for mark, name in _ENCODED.items():
        if head.startswith(mark):
            return Container(encoding=name)
    return Container(_text_container(head.removeprefix(UTF8_BOM).lstrip(), path))


def _text_container(head: bytes, path: Path) -> str:
    suffixes = [suffix.lower() for suffix in reversed(path.suffixes)]
    suffix = next((suffix for suffix in suffixes if suffix in (".csv", ".tsv")), "")
    if suffix and head[:1] not in (b"{", b"["):
        return TSV if suffix == ".tsv" else CSV
    line, newline, rest = head.partition(b"\n")
    line = line.strip()
    if line[:1] == b"[":
        # a list that ends on the first of several lines is one bad row, not the bracket around all records
        return LINES if newline and line.endswith(b"]") and len(line) > 1 and rest.strip() else ARRAY
    # an object written over several lines has little on its first line
    if newline and rest.lstrip()[:1] == b'"' and len(line) < 80 and line[:1] == b"{" and line[-1:] != b"}":
        try:
            json.loads(line)
        except json.JSONDecodeError as error:
            if not line[error.pos :].strip() or line.endswith((b",", b"[", b"{")):
                return VALUES
        except ValueError:
            return LINES
    return LINES
