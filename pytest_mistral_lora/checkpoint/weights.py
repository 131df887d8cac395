"""Safetensors files: their headers, read strictly, their tensors one at a time, and files written tensor by tensor."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_mistral_lora.chat.reading import (
    JSON_LIMIT,
    in_utf8,
    open_regular,
    opened,
    parse_json,
    read_json,
    similar_path,
)
from pytest_mistral_lora.errors import InputError, PinError

if TYPE_CHECKING:
    import numpy as np
    import torch


_EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight", "tok_embeddings.weight", "output.weight")
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"}
_NAMES |= {f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}
_NAMES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}
_NAMES |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The entry of one tensor in a safetensors header.

    Attributes:
        file: The file that holds it.
        dtype: Its dtype as safetensors writes it: `F32`, `BF16`, …
        shape: Its shape.
        start: Offset of its first byte in the file.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def dtype_name(self) -> str:
        """The dtype as torch, numpy and ml_dtypes name it, such as `bfloat16`.

        Raises:
            InputError: If numpy has no such dtype, as for numbers of four bits.
        """
        if self.dtype not in _NAMES:
            known = ", ".join(_NAMES)
            raise InputError(f"a tensor of {self.dtype}", place=str(self.file), expected=f"one of {known}")
        return _NAMES[self.dtype]

    def read_bytes(self, file: BinaryIO | None = None) -> bytes:
        """Return the tensor's bytes, little-endian, in row order.

        Args:
            file: The file, if it is open.
        """
        if file is None:
            with opened(self.file) as file:
                return self.read_bytes(file)
        file.seek(self.start)
        return file.read(self.size * _BITS[self.dtype] // 8)

    def read(self, file: BinaryIO | None = None) -> np.ndarray[Any, Any]:
        """Return the tensor as a read-only array of its shape; its dtype may be one of ml_dtypes.

        Args:
            file: The file, if it is open.

        Raises:
            InputError: As for `dtype_name`.
        """
        import ml_dtypes
        import numpy as np

        # numpy itself has no bfloat16 and no 8-bit floats
        dtype = np.dtype(getattr(ml_dtypes, self.dtype_name, self.dtype_name))
        return np.frombuffer(self.read_bytes(file), dtype).reshape(self.shape)


_PICKLE_STARTS = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))
"""The first bytes of torch.save's zip file, and of a pickle of each protocol from 2 on."""

_MOST_DIMENSIONS = 64
_LARGEST_SIZE = (1 << 63) - 1
_LONGEST_NAME, _LONGEST_REASON = 1000, 2000
"""Unbounded, the product of a hostile shape takes hours, and its message megabytes. torch's sizes have 64 bits."""


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file, and compare every size in it with the size of the file.

    No weight is read, and no memory is allocated by a size that the file claims.

    Raises:
        InputError: If it is not a safetensors file, is cut off, or its sizes contradict each other.
    """
    with open_regular(file) as content:
        size, start = file.stat().st_size, content.read(9)
        try:
            return _parse_header(file, size, start[:8], content)
        except InputError as error:
            # the length of a sound header can have the same first bytes (640 is 80 02), but then comes a brace
            if start.startswith(_PICKLE_STARTS) and start[8:] != b"{":
                found = "a pickle under the name of safetensors: not loaded"
                raise InputError(found, place=str(file), expected="safetensors") from error
            raise


def _parse_header(file: Path, size: int, start: bytes, content: BinaryIO) -> dict[str, TensorInfo]:
    # https://github.com/huggingface/safetensors#format: 8 bytes of length, the header as JSON, then the data
    length = int.from_bytes(start, "little")
    if len(start) < 8 or not 2 <= length <= min(size - 8, JSON_LIMIT):
        found = f"{size} bytes, with a header of {length}" if len(start) == 8 else f"{size} bytes"
        raise InputError(f"not a safetensors file, or cut off: {found}", place=str(file), expected="safetensors")
    content.seek(8)
    header = parse_json(content.read(length), file)
    tensors: dict[str, TensorInfo] = {}
    data, end = 8 + length, 0
    try:
        entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
        # in the order of the data: each tensor must begin where the one before ends
        for name, entry in sorted(entries, key=lambda pair: tuple(pair[1]["data_offsets"])):
            begin, stop = entry["data_offsets"]
            # a name goes into messages: control characters in it would reach the terminal
            if not name.isprintable() or len(name) > _LONGEST_NAME:
                raise ValueError(f"a tensor named {name[:_LONGEST_NAME]!a}")
            if len(entry["shape"]) > _MOST_DIMENSIONS:
                raise ValueError(f"{name} with {len(entry['shape'])} dimensions")
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            # `isinstance` would take true and false for sizes
            for number in (begin, stop, *shape):
                if type(number) is not int or not 0 <= number <= _LARGEST_SIZE:
                    raise ValueError(f"{name} with a size of {number if type(number) is int else type(number)}")
            if (stop - begin) * 8 != math.prod(shape) * _BITS[dtype]:
                raise ValueError(f"{stop - begin} bytes for {dtype} {list(shape)}")
            if begin != end:
                raise InputError(f"tensors overlap or leave a hole at byte {end} of the data", place=str(file))
            tensors[name], end = TensorInfo(file, dtype, shape, data + begin), stop
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        raise InputError(f"a header that is not safetensors': {reason[:_LONGEST_REASON]}", place=str(file)) from error
    if end != size - 8 - length:
        found = f"cut off, or with bytes too many: its header describes {end} bytes of data, not {size - 8 - length}"
        raise InputError(found, place=str(file))
    return tensors


def embedding_rows(header: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Return the rows of each embedding and output matrix in the header of a safetensors file, by tensor name."""
    found = ((name, info) for name, info in header.items() if name.endswith(_EMBEDDINGS))
    return {name: info.shape[0] for name, info in found if len(info.shape) == 2}


INDEX = "model.safetensors.index.json"
"""The index of a checkpoint with several files: it names the file of each tensor."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, in name order.

    A lone `consolidated.safetensors` beside a `model*.safetensors` is Mistral's own copy of the same weights, and is
    left out: transformers does not read it.

    Raises:
        PinError: If the folder has no such file; weights in pickle files are not loaded.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        if folder.is_dir():
            found = "no weights"
        elif folder.exists():
            found = "a file"
        else:
            found = f"no such folder{similar_path(folder)}"
        if any(folder.glob("consolidated*.safetensors")):
            found = "no weights but consolidated.safetensors, in Mistral's own format, which transformers does not load"
        # the fix of the rule fetches a pin, and does not mend a path
        step = "" if folder.exists() else "Name the folder of the base: base.path of the recipe, or --base."
        raise PinError(found, place=str(folder), expected="model.safetensors, or its shards", next_step=step)
    return files


def read_index(file: Path) -> dict[str, str]:
    """Return the name of each tensor's file, as an index gives it; the file may be missing.

    Raises:
        InputError: If the index is not valid.
    """
    data = read_json(file)
    listed = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        expected = "weight_map, with the name of a file for each tensor"
        raise InputError("not an index of safetensors files", place=str(file), expected=expected)
    return listed


DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The dtypes of full weights: torch's name, and that of a safetensors header."""

_ALIGNMENT = 8
"""The data of a safetensors file begins at a multiple of this number of bytes."""


class Weights(Mapping[str, "torch.Tensor"]):
    """The tensors of safetensors files by name, each loaded on access and not kept.

    Attributes:
        files: The files, in order.
        infos: The header's entry of each tensor, in the order of the data.
    """

    def __init__(self, files: Sequence[Path], header: Callable[[Path], Mapping[str, TensorInfo]] = read_header) -> None:
        """Take the headers of the files.

        Args:
            files: The files, in order.
            header: Returns the header of a file, which may have been read already.

        Raises:
            InputError: If a file is not a complete safetensors file, or two have a tensor of the same name.
        """
        self.files: tuple[Path, ...] = tuple(files)
        self.infos: dict[str, TensorInfo] = {}
        self._open: dict[Path, BinaryIO] = {}
        for file in self.files:
            for name, info in header(file).items():
                if name in self.infos:
                    raise InputError(f"{name} is in {self.infos[name].file.name} too", place=str(file))
                self.infos[name] = info

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU, in its own dtype."""
        from safetensors import safe_open

        # opened for each tensor: the pages of a mapped file count as this process's memory until it is closed
        with in_utf8(self.infos[name].file) as named, safe_open(named, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Keep the files open for `array` and `read_bytes`: opening a file costs more than reading a small tensor."""
        before = self._open
        with ExitStack() as stack:
            self._open = {file: stack.enter_context(opened(file)) for file in self.files}
            try:
                yield
            finally:
                self._open = before

    def array(self, name: str) -> np.ndarray[Any, Any]:
        """Return a tensor like `TensorInfo.read`, without torch."""
        info = self.infos[name]
        return info.read(self._open.get(info.file))

    def read_bytes(self, name: str) -> bytes:
        """Return a tensor's bytes like `TensorInfo.read_bytes`."""
        info = self.infos[name]
        return info.read_bytes(self._open.get(info.file))

    def __iter__(self) -> Iterator[str]:
        """Yield the names, file by file, in the order of the data."""
        return iter(self.infos)

    def __contains__(self, name: object) -> bool:
        """Return whether a tensor of this name exists, without loading it."""
        return name in self.infos

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.infos)


def write_safetensors(
    file: Path, shapes: Mapping[str, Sequence[int]], dtype: str, tensor: Callable[[str], torch.Tensor]
) -> None:
    """Write a safetensors file whose tensors are made one by one; safetensors itself needs all of them at once.

    Args:
        file: The file, which does not exist yet.
        shapes: Shape of each tensor by name, in the order of the file.
        dtype: dtype of all of them, a key of `DTYPES`.
        tensor: Returns the tensor of a name, of that shape and dtype, on the CPU.
    """
    import torch

    size, at = getattr(torch, dtype).itemsize, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in shapes.items():
        end = at + math.prod(shape) * size
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("xb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            output.write(tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy().data)


def interleaved(weight: Any, heads: Any, name: str) -> Any:
    """Return the rows of a query's or key's projection in the order of a GGUF file and of Mistral's own format.

    In each head, the rows of its two halves come in turn: there, the rotary embedding turns neighbours.

    Args:
        weight: The matrix in transformers' order, of shape (heads * width, …).
        heads: The number of heads, as a file has it.
        name: The name of the tensor, for the error.

    Raises:
        InputError: If the number of heads does not divide the rows.
    """
    rows = weight.shape[0]
    if type(heads) is not int or heads < 1 or rows % (2 * heads):
        raise InputError(f"{name} has {rows} rows, and the number of heads is {heads!r}", expected="rows for each head")
    half = rows // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
