"""GGUF files, a form in which servers read a model: metadata, and the places of tensors.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The package `gguf` reads the same, but trusts the
lengths that a file claims, and needs 8 s for a Tekken vocabulary. Here every length is compared with the size of the
file before it is used, and memory has bounds far above any real file. The package is needed only to dequantise tensors.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from pytest_mistral_lora.chat.reading import open_regular
from pytest_mistral_lora.checkpoint.recognition import StoredVocabulary, as_bytes
from pytest_mistral_lora.errors import InputError, shortened

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_TYPES: Mapping[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""For each type of ggml: its name, the numbers in a block, and the bytes of a block."""
_MOST_HEADER, _MOST_KEYS, _MOST_VALUES, _MOST_TENSORS = 128 << 20, 1 << 16, 1 << 22, 1 << 18
"""Bounds on the bytes of a header, its keys, the entries of all its lists, and its tensors. A vocabulary of 262,144
tokens has some 20 MB and 1,500,000 entries; in memory, an entry takes up to 100 bytes."""
_LONGEST_NAME = 1000
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
    """A GGUF file; its header is read once.

    Attributes:
        path: The file.
        fields: Its metadata, by key.
        tensors: Its tensors, by name.
        is_adapter: Whether it holds a LoRA adapter, and not a model.
        parts: The number of files that the model is split into.
        architecture: The name of the architecture in the file: `llama` for Mistral-7B.
        template: The chat template; None if it is missing.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            InputError: If it is not a GGUF file, is cut off, or its lengths contradict its size.
        """
        self.path = path
        with open_regular(path) as file:
            header = _Header(file, path)
        self.fields: Mapping[str, Any] = header.fields
        self.tensors: Mapping[str, GgufTensor] = header.tensors
        self.is_adapter: bool = self.fields.get("general.type") == "adapter"
        count = self.fields.get("split.count")
        self.parts: int = count if type(count) is int else 1
        architecture = str(self.fields.get("general.architecture"))
        if not architecture.isprintable() or len(architecture) > _LONGEST_NAME:
            found = f"general.architecture is {shortened(architecture)}"
            raise InputError(found, place=str(path), expected="a name such as 'llama'")
        self.architecture: str = architecture
        template = self.fields.get("tokenizer.chat_template")
        self.template: str | None = template if isinstance(template, str) else None

    def setting(self, name: str) -> Any:
        """Return a field of the tokenizer, such as `add_space_prefix`; None if it is missing."""
        return self.fields.get(_VOCABULARY + name)

    @cached_property
    def vocabulary(self) -> StoredVocabulary | None:
        """The bytes of each id; None if the vocabulary is missing, or of another kind of tokenizer."""
        kind, tokens = _KINDS.get(str(self.setting("model"))), self.setting("tokens")
        if kind is None or not isinstance(tokens, list):
            return None
        stored = {number: as_bytes(str(token), kind) for number, token in enumerate(tokens)}
        return StoredVocabulary(kind, stored, self.path.name)

    def values(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor as float32, dequantised by the package `gguf`.

        Raises:
            InputError: If `gguf` does not know its type, or the file was cut off.
        """
        import gguf
        import numpy as np

        tensor = self.tensors[name]
        _, block, size = _TYPES[tensor.kind]
        row = tensor.shape[-1] // block * size
        try:
            with open_regular(self.path) as file:
                file.seek(tensor.start)
                raw = np.frombuffer(file.read(row * math.prod(tensor.shape[:-1])), dtype=np.uint8)
            rows = raw.reshape(*tensor.shape[:-1], row)
            found: np.ndarray[Any, Any] = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(tensor.kind))
        except (NotImplementedError, ValueError) as error:
            raise InputError(f"{name} cannot be read: {error}", place=str(self.path)) from error
        return found.reshape(tensor.shape)

    def kind_of(self, name: str) -> str:
        """Return the name of a tensor's type, such as `Q8_0`."""
        return _TYPES[self.tensors[name].kind][0]


class _Header:
    """Reads the header of a GGUF file, and compares every length with the bytes that are left."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._at = file, path, 0
        self._size = os.fstat(file.fileno()).st_size
        self._values = 0
        magic = self._bytes(min(4, self._size))
        if magic != MAGIC:
            raise self._error(f"begins with {magic!r}" if magic else "is empty", "a GGUF file")
        version = self._scalar("I")
        if version not in (2, 3):
            # written on a big-endian machine, 3 reads as 50331648
            raise self._error(f"has version {version}", "version 2 or 3, little-endian")
        count, pairs = self._scalar("Q"), self._scalar("Q")
        self.fields = self._read_fields(self._bounded(pairs, 13, _MOST_KEYS, "keys"))
        found = [self._read_tensor() for _ in range(self._bounded(count, 24, _MOST_TENSORS, "tensors"))]
        step = self.fields.get("general.alignment", 32)
        if type(step) is not int or step < 8 or step & (step - 1):
            raise self._error(f"general.alignment is {shortened(step)}", "a power of 2, from 8 on")
        start = math.ceil(self._at / step) * step
        self.tensors: dict[str, GgufTensor] = {}
        for name, tensor in found:
            if name in self.tensors:
                raise self._error(f"has the tensor {name!r} twice", "one tensor of a name")
            self.tensors[name] = replace(tensor, start=start + tensor.start)
        self._require_room(step)

    def _error(self, found: str, expected: str) -> InputError:
        return InputError(found, place=str(self._path), expected=expected)

    def _read_fields(self, count: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for _ in range(count):
            name = self._name("key")
            if name in fields:
                raise self._error(f"has the key {name!r} twice", "one value")
            fields[name] = self._value(self._scalar("I"))
        return fields

    def _read_tensor(self) -> tuple[str, GgufTensor]:
        """Return the name and the entry of a tensor; its start counts from the start of the data."""
        name, dimensions = self._name("tensor"), self._scalar("I")
        if not 1 <= dimensions <= 4:
            raise self._error(f"has the tensor {name!r} of {dimensions} dimensions", "from 1 to 4")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        kind, start = self._scalar("I"), self._scalar("Q")
        if kind not in _TYPES:
            raise self._error(f"has the tensor {name!r} of type {kind}", "a type of ggml that is known here")
        title, block, _ = _TYPES[kind]
        if not all(shape) or shape[-1] % block:
            raise self._error(f"has the tensor {name!r} of shape {shape}", f"rows of blocks of {block}, as {title} has")
        return name, GgufTensor(shape, kind, start)

    def _require_room(self, step: int) -> None:
        """Refuse tensors without bytes in the file, tensors that share bytes, and tensors that are not aligned."""
        end = 0
        for name, tensor in sorted(self.tensors.items(), key=lambda item: item[1].start):
            _, block, size = _TYPES[tensor.kind]
            if tensor.start % step or tensor.start < end:
                found = f"{name!r} begins at byte {tensor.start}"
                raise self._error(found, f"a multiple of {step} from {end} on, where the tensor before it ends")
            end = tensor.start + math.prod(tensor.shape) // block * size
            if end > self._size:
                found = f"is cut off: {name!r} has the bytes from {tensor.start} to {end}"
                raise self._error(found, f"at most {self._size} bytes")

    def _bounded(self, count: int, size: int, most: int = _MOST_HEADER, title: str = "bytes") -> int:
        """Return a number of entries, each of at least `size` bytes, if the file has room for them."""
        left = self._size - self._at
        if count * size > left:
            raise self._error(f"is cut off, or claims {count:,} entries at byte {self._at}", f"room for them in {left}")
        if count > most or self._at + count * size > _MOST_HEADER:
            found = f"claims {count:,} {title} at byte {self._at}"
            raise self._error(found, f"at most {most:,}, and {_MOST_HEADER >> 20} MiB of header")
        return count

    def _bytes(self, count: int) -> bytes:
        data = self._file.read(self._bounded(count, 1))
        if len(data) < count:
            raise self._error(f"ends at byte {self._at + len(data)} while it is read", f"{self._size} bytes")
        self._at += count
        return data

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))
        return value

    def _string(self, errors: str = "strict") -> str:
        data = self._bytes(self._scalar("Q"))
        try:
            return data.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            found = f"has the text {data[:80]!r} at byte {self._at - len(data)}"
            raise self._error(found, "a text in UTF-8") from error

    def _name(self, title: str) -> str:
        name = self._string()
        if not name.isprintable() or len(name) > _LONGEST_NAME:
            raise self._error(f"has a {title} {name[:80]!a}", "a name of printable letters")
        return name

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._error(f"has a value of type {kind} at byte {self._at}", "a type from 0 to 12")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner not in _SCALARS and inner != _STRING:
            # no writer nests arrays, and a file could nest them endlessly
            raise self._error(f"has an array of type {inner} at byte {self._at}", "numbers or strings")
        size = 8 if inner == _STRING else struct.calcsize(_SCALARS[inner])
        self._values += self._bounded(count, size, _MOST_VALUES - self._values, "values")
        if inner == _STRING:
            # tokens of a damaged vocabulary may not be UTF-8: the check of the tokenizer reports them
            return [self._string("surrogateescape") for _ in range(count)]
        return list(struct.unpack(f"<{count}{_SCALARS[inner]}", self._bytes(count * size)))
