"""The kind of record and the type of chunk that tests bring along, known while a test runs; sound records of both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from toy_chunk import ASIDE
from toy_kind import POEM

from pytest_mistral_lora.chat.chunks.registry import chunk_types, register_types
from pytest_mistral_lora.chat.kinds.registry import KINDS, register_kinds
from pytest_mistral_lora.chat.oracle import Oracle

Data = dict[str, Any]

_WORDS = ["roses", "rivers", "stones", "birds", "clouds", "rain", "snow", "night"]


@contextmanager
def toys_known() -> Iterator[None]:
    """Register the toys as a package that brings them does, and forget them at the end."""
    register_kinds([POEM.importable])
    register_types([ASIDE.importable])
    try:
        yield
    finally:
        KINDS.pop(POEM.name, None)
        chunk_types().pop(ASIDE.name, None)


def poems() -> list[Data]:
    """Return sound poems."""
    return [{"poem": [f"The {word} are here", f"and {number} of them stay."]} for number, word in enumerate(_WORDS)]


def asides() -> list[Data]:
    """Return sound conversations whose answers have an aside."""
    found = []
    for number, word in enumerate(_WORDS):
        said, beside = f"The {word} are red.", f"or blue, {number} say"
        answer = [{"type": "text", "text": said}, {"type": "aside", "aside": beside}]
        # chunks on both sides, as a table has them: its columns have one type
        asked = {"role": "user", "content": [{"type": "text", "text": f"Which colour have {word}?"}]}
        found.append({"messages": [asked, {"role": "assistant", "content": answer}]})
    return found


def with_ids(oracle: Oracle, records: list[Data]) -> list[Data]:
    """Return records with their ids and labels beside them."""
    found = []
    for record in records:
        encoded = oracle.encode(record)
        found.append({**record, "input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())})
    return found


def ids_alone(lines: list[Data]) -> list[Data]:
    """Return the ids and labels of lines."""
    return [{key: line[key] for key in ("input_ids", "labels")} for line in lines]


def write_lines(path: Path, lines: list[Data]) -> Path:
    """Write one record a line."""
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path
