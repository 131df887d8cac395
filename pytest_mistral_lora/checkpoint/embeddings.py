"""The number of rows of a checkpoint's embeddings, from the headers of its safetensors files: no weight is read."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.errors import InputError

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
