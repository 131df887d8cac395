"""GGUF files, the form in which llama.cpp and Ollama read a model: metadata, and the places of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` reads the same, but takes the
lengths that a file claims on trust, and needs 8 s for a Tekken vocabulary. Here every length is held to the size of
the file before it is used. The package is needed for the numbers of tensors alone.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytest_mistral_lora.chat.reading import opened
from pytest_mistral_lora.checkpoint.recognition import StoredVocabulary, as_bytes
from pytest_mistral_lora.errors import InputError

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KINDS: Mapping[str, Literal["spm", "tekken"]] = {"llama": "spm", "gpt2": "tekken"}
_VOCABULARY = "tokenizer.ggml."


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor in a GGUF file.

    Attributes:
        shape: Its shape, in the order of numpy and PyTorch: rows first.
        kind: The number of its type among ggml's: 0 for F32, 1 for F16, 8 for Q8_0, …
        start: Offset of its first byte in the file.
    """

    shape: tuple[int, ...]
    kind: int
    start: int


class GgufFile:
    """A GGUF file, whose header is read once.

    Attributes:
        path: The file.
        fields: Its metadata, by key.
        tensors: Its tensors, by name.
        is_adapter: Whether it holds a LoRA adapter, and not a model.
        parts: The number of files that the model is split into.
        architecture: The name of the architecture in llama.cpp: `llama` for Mistral-7B.
        template: The chat template; None if there is none.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            InputError: If it is not a GGUF file, is cut off, or its lengths contradict its size.
        """
        self.path = path
        try:
            with opened(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                header = _Header(data, path)
                self.fields: Mapping[str, Any] = header.fields
                self.tensors: Mapping[str, GgufTensor] = header.tensors
        except ValueError as error:
            # mmap refuses a file of no bytes
            raise InputError(f"is empty: {error}", place=str(path), expected="a GGUF file") from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", place=str(path)) from error
        self.is_adapter: bool = self.fields.get("general.type") == "adapter"
        count = self.fields.get("split.count")
        self.parts: int = count if type(count) is int else 1
        self.architecture: str = str(self.fields.get("general.architecture"))
        template = self.fields.get("tokenizer.chat_template")
        self.template: str | None = template if isinstance(template, str) else None

    def setting(self, name: str) -> Any:
        """Return a field of the tokenizer, such as `add_space_prefix`; None if it is missing."""
        return self.fields.get(_VOCABULARY + name)

    @cached_property
    def vocabulary(self) -> StoredVocabulary | None:
        """The bytes of each id; None if there is no vocabulary, or one of another kind of tokenizer."""
        kind, tokens = _KINDS.get(str(self.setting("model"))), self.setting("tokens")
        if kind is None or not isinstance(tokens, list):
            return None
        stored = {number: as_bytes(str(token), kind) for number, token in enumerate(tokens)}
        return StoredVocabulary(kind, stored, self.path.name)

    def values(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor as float32, dequantised by the package `gguf`.

        Raises:
            InputError: If `gguf` does not know its type.
        """
        import gguf
        import numpy as np

        tensor = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(tensor.kind)
            block, size = gguf.GGML_QUANT_SIZES[kind]
            row = tensor.shape[-1] // block * size
            rows = math.prod(tensor.shape[:-1])
            with opened(self.path) as file:
                file.seek(tensor.start)
                raw = np.frombuffer(file.read(row * rows), dtype=np.uint8).reshape(*tensor.shape[:-1], row)
            found: np.ndarray[Any, Any] = gguf.quants.dequantize(raw, kind).reshape(tensor.shape)
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{name} cannot be read: {error}", place=str(self.path)) from error
        return found

    def kind_of(self, name: str) -> str:
        """Return the name of a tensor's type, such as `Q8_0`."""
        import gguf

        return gguf.GGMLQuantizationType(self.tensors[name].kind).name


class _Header:
    """Reads the header of a GGUF file, whose every length is held to the bytes that are left."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._at = data, path, 0
        if data[:4] != MAGIC:
            raise self._error(f"begins with {data[:4]!r}", "a GGUF file")
        self._at = 4
        version = self._scalar("I")
        if version not in (2, 3):
            # written on a big-endian machine, 3 reads as 50331648
            raise self._error(f"has version {version}", "version 2 or 3, little-endian")
        count, pairs = self._scalar("Q"), self._scalar("Q")
        self.fields: dict[str, Any] = {}
        for _ in range(self._bounded(pairs, 13)):
            name = self._string()
            if name in self.fields:
                raise self._error(f"has the key {name!r} twice", "one value")
            self.fields[name] = self._value(self._scalar("I"))
        found = []
        for _ in range(self._bounded(count, 24)):
            name, dimensions = self._string(), self._scalar("I")
            if dimensions > 4 or not name.isprintable():
                raise self._error(f"has a tensor {name[:80]!a} of {dimensions} dimensions", "at most 4")
            shape = tuple(self._scalar("Q") for _ in range(dimensions))
            found.append((name, shape[::-1], self._scalar("I"), self._scalar("Q")))
        step = self.fields.get("general.alignment", 32)
        if type(step) is not int or step < 1 or step % 8:
            raise self._error(f"general.alignment is {step!r}", "a multiple of 8")
        start = math.ceil(self._at / step) * step
        self.tensors = {name: GgufTensor(shape, kind, start + offset) for name, shape, kind, offset in found}
        for name, tensor in self.tensors.items():
            # a type of one bit for each number is the smallest
            if tensor.start + math.prod(tensor.shape) // 8 > len(data):
                raise self._error(f"is cut off: {name} begins at byte {tensor.start}", f"more than {len(data)} bytes")

    def _error(self, found: str, expected: str) -> InputError:
        return InputError(found, place=str(self._path), expected=expected)

    def _bounded(self, count: int, size: int) -> int:
        """Return a number of entries, each of at least `size` bytes, if the file has room for them."""
        left = len(self._data) - self._at
        if count * size > left:
            raise self._error(f"is cut off, or claims {count:,} entries at byte {self._at}", f"room for them in {left}")
        return count

    def _scalar(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        self._bounded(1, size)
        (value,) = struct.unpack_from(f"<{code}", self._data, self._at)
        self._at += size
        return value

    def _string(self) -> str:
        length = self._bounded(self._scalar("Q"), 1)
        self._at += length
        # ids of a damaged vocabulary may be no UTF-8: the check of the tokenizer names them
        return self._data[self._at - length : self._at].decode("utf-8", "surrogateescape")

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._error(f"has a value of type {kind} at byte {self._at}", "a type from 0 to 12")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            size = self._bounded(count, struct.calcsize(code)) * struct.calcsize(code)
            values = list(struct.unpack_from(f"<{count}{code}", self._data, self._at))
            self._at += size
            return values
        if inner != _STRING:
            # no writer nests arrays, and a file could nest them without end
            raise self._error(f"has an array of type {inner} at byte {self._at}", "numbers or strings")
        return [self._string() for _ in range(self._bounded(count, 8))]
