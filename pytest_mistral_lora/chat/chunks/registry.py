"""The types of chunks, by name: those of this package, and those that another package registers."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import import_module
from typing import Any

from pytest_mistral_lora.chat import chunks
from pytest_mistral_lora.chat.chunks.chunk_type import BlockType, ChunkData, ChunkType
from pytest_mistral_lora.places import Place


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


def is_block(chunk: ChunkData) -> bool:
    """Return whether the tokens of a checked chunk are a block of control tokens."""
    return isinstance(type_of(chunk), BlockType)


def block_types() -> dict[str, BlockType]:
    """Return the types whose tokens are blocks of control tokens, by the control token that opens a block."""
    return {kind.block[0]: kind for kind in chunk_types().values() if isinstance(kind, BlockType)}


def block_literals() -> frozenset[str]:
    """Return the control tokens of blocks, which have no loss under any objective."""
    return frozenset(literal for kind in block_types().values() for literal in kind.block)


def blocks_in(contents: Iterable[Any]) -> list[tuple[ChunkData, BlockType]]:
    """Return the chunks of some checked contents whose tokens are blocks, with their types."""
    chunks = (chunk for content in contents if not isinstance(content, str | None) for chunk in content)
    return [(chunk, kind) for chunk in chunks if isinstance(kind := type_of(chunk), BlockType)]


def measured(message: Mapping[str, Any], place: Place) -> Mapping[str, Any]:
    """Return a checked message whose chunks have the measures that their ids are made of.

    Args:
        message: The message.
        place: Its place.

    Raises:
        UncheckedRowError: If a measure is not known here.
        RowError: If an asset of a chunk cannot be used.
    """
    content = message.get("content")
    if isinstance(content, str | None):
        return message
    chunks = [type_of(chunk).measured(chunk, place / "content" / at) for at, chunk in enumerate(content)]
    is_same = all(new is chunk for new, chunk in zip(chunks, content, strict=True))
    return message if is_same else {**message, "content": chunks}
