"""The types of chunks, by name: those of this package, and those that another package registers."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from functools import cache
from importlib import import_module
from typing import Any

from pytest_mistral_lora.chat import chunks
from pytest_mistral_lora.chat.chunks.chunk_type import ChunkData, ChunkType


@cache
def chunk_types() -> dict[str, ChunkType]:
    """Return the types of chunks, by name, in the order in which they are named.

    The modules of types stand on the checks of fields, which ask for the types: they are imported when first asked for.
    """
    modules = [f"{chunks.__name__}.{module.name}" for module in pkgutil.iter_modules(chunks.__path__)]
    found = [
        value
        for module in modules
        for value in vars(import_module(module)).values()
        if isinstance(value, ChunkType) and value.importable.startswith(f"{module}:")
    ]
    return {kind.name: kind for kind in sorted(found, key=lambda kind: kind.order)}


def type_names() -> tuple[str, ...]:
    """Return the importable name of each type."""
    return tuple(kind.importable for kind in chunk_types().values())


def register_types(importable: Iterable[str]) -> None:
    """Add types by their importable names, `package.module:ATTRIBUTE`; one that is registered already stays."""
    types = chunk_types()
    for name in importable:
        module, _, attribute = name.partition(":")
        kind: ChunkType = getattr(import_module(module), attribute)
        types.setdefault(kind.name, kind)


def types_in(contents: Iterable[Any]) -> set[str]:
    """Return the names of the types of the chunks in some checked contents."""
    return {chunk["type"] for content in contents if not isinstance(content, str | None) for chunk in content}


def type_of(chunk: ChunkData) -> ChunkType:
    """Return the type of a checked chunk."""
    return chunk_types()[chunk["type"]]
