"""The number of rows of a checkpoint's embeddings, from the headers of its safetensors files: no weight is read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.errors import InputError

if TYPE_CHECKING:
    import torch


_LONGEST_HEADER = 100_000_000  # bytes; the format's own bound
_NAMES = ("embed_tokens.weight", "lm_head.weight", "tok_embeddings.weight", "output.weight")


def embedding_rows(file: Path) -> dict[str, int]:
    """Return the rows of each embedding and output matrix in a safetensors file, by tensor name.

    Raises:
        InputError: If it is not a whole safetensors file.
    """
    return {name: rows for name, rows in _rows(read_header(file)) if name.endswith(_NAMES)}


def read_header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: tensor name to dtype, shape and offsets.

    Raises:
        InputError: If it is not a whole safetensors file.
    """
    try:
        with file.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length:,} bytes")
            header = json.loads(content.read(length))
        end = 8 + length + max((entry["data_offsets"][1] for _, entry in _tensors(header)), default=0)
        size = file.stat().st_size
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        raise InputError(f"is not a safetensors file: {error}", place=str(file)) from error
    if end != size:
        raise InputError(f"has {size:,} bytes, and its header describes {end:,}", place=str(file))
    return dict(header)


def _tensors(header: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((name, entry) for name, entry in header.items() if name != "__metadata__")


def _rows(header: dict[str, Any]) -> Iterator[tuple[str, int]]:
    for name, entry in _tensors(header):
        shape = entry.get("shape")
        if isinstance(shape, list) and len(shape) == 2 and isinstance(shape[0], int):
            yield name, shape[0]


DTYPES: Mapping[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The dtypes of full weights: torch's name, and that of a safetensors header."""

_ALIGNMENT = 8
"""The data of a safetensors file begins at a multiple of this many bytes."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor.

    Attributes:
        file: The file that holds it.
        dtype: Its dtype as safetensors writes it: `F32`, `BF16`, …
        shape: Its shape.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


class Weights(Mapping[str, "torch.Tensor"]):
    """The tensors of safetensors files by name, each loaded when it is asked for and kept by nobody.

    Attributes:
        files: The files, in order.
        infos: What their headers say of each tensor, in the order of the data.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        """Read the headers of the files.

        Raises:
            InputError: If one is not a whole safetensors file, or two have a tensor of the same name.
        """
        self.files = tuple(files)
        self.infos: dict[str, TensorInfo] = {}
        for file in self.files:
            for name, entry in _in_data_order(read_header(file)):
                if name in self.infos:
                    raise InputError(f"{name} is in {self.infos[name].file.name} too", place=str(file))
                self.infos[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]))

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor on the CPU, in its own dtype."""
        from safetensors import safe_open

        # opened for each tensor: the pages of a mapped file count as this process's memory until it is closed
        with safe_open(self.infos[name].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Yield the names, file by file, in the order of the data."""
        return iter(self.infos)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.infos)

    def names_in(self, file: Path) -> list[str]:
        """Return the names of one file's tensors, in the order of the data."""
        return [name for name, info in self.infos.items() if info.file == file]


def _in_data_order(header: Mapping[str, Any]) -> list[tuple[str, Any]]:
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    return sorted(entries, key=lambda one: tuple(one[1]["data_offsets"]))


def write_safetensors(
    file: Path, shapes: Mapping[str, Sequence[int]], dtype: str, tensor: Callable[[str], torch.Tensor]
) -> None:
    """Write a safetensors file whose tensors are made one by one; safetensors itself takes all of them at once.

    Args:
        file: The file, which is not there yet.
        shapes: Shape of each tensor by name, in the order in which they are written.
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
