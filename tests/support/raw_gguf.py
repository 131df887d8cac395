"""GGUF files written byte by byte, with any count, length and type: those that no writer makes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


def text(value: str | bytes, length: int | None = None) -> bytes:
    """Return a string of GGUF, with its length or another one."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data) if length is None else length) + data


def scalar(kind: int, value: Any) -> bytes:
    """Return a value of a type that is no array, with its type."""
    return struct.pack("<I", kind) + (text(value) if kind == STRING else struct.pack(f"<{CODES[kind]}", value))


def array(kind: int, values: Sequence[Any], count: int | None = None) -> bytes:
    """Return an array, with its type, and with its count or another one."""
    entries = b"".join(text(value) if kind == STRING else struct.pack(f"<{CODES[kind]}", value) for value in values)
    return struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count) + entries


def plain(value: Any) -> bytes:
    """Return a plain value as a writer stores it, with its type."""
    if isinstance(value, list):
        first = value[0] if value else ""
        return array(STRING if isinstance(first, str | bytes) else 6 if isinstance(first, float) else 5, value)
    kinds = ((bool, 7), (int, 4), (float, 6), (str | bytes, STRING))
    return scalar(next(kind for one, kind in kinds if isinstance(value, one)), value)


@dataclass
class RawTensor:
    """The entry of a tensor: its name, its dimensions as the file has them, its type, and the offset of its data."""

    name: str | bytes
    dimensions: tuple[int, ...] = (32,)
    kind: int = 0
    offset: int = 0
    count: int | None = None

    def encoded(self) -> bytes:
        """Return its bytes."""
        count = len(self.dimensions) if self.count is None else self.count
        sizes = struct.pack(f"<{len(self.dimensions)}Q", *self.dimensions)
        return text(self.name) + struct.pack("<I", count) + sizes + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class RawGguf:
    """A GGUF file in parts: keys with encoded values, and tensors."""

    keys: list[tuple[str | bytes, bytes]]
    tensors: list[RawTensor]
    data: bytes = b""
    version: int = 3
    alignment: int = 32
    key_count: int | None = None
    tensor_count: int | None = None
    order: str = field(default="<")

    def encoded(self) -> bytes:
        """Return the file's bytes."""
        keys = len(self.keys) if self.key_count is None else self.key_count
        tensors = len(self.tensors) if self.tensor_count is None else self.tensor_count
        head = b"GGUF" + struct.pack(f"{self.order}IQQ", self.version, tensors, keys)
        head += b"".join(text(name) + value for name, value in self.keys)
        head += b"".join(tensor.encoded() for tensor in self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data
