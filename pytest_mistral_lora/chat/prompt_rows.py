"""Rows that a model is asked to continue: the last assistant turn need not be there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.errors import RowError, RowsError

_PLACEHOLDER = {"role": "assistant", "content": "."}
"""Stands for the turn that a model generates. No prompt contains it: a prompt ends before the last assistant turn."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A conversation for a model to continue.

    Attributes:
        row: The conversation; the model answers in place of its last assistant turn.
        has_answer: Whether that turn is of the file, so that an answer can be compared with it.
    """

    row: Row
    has_answer: bool


def prompt_row(data: Any, *, place: str = "") -> PromptRow:
    """Return plain JSON data as a conversation to continue: one that ends with an answer, or with a question.

    Raises:
        RowError: If the data is not a row.
    """
    messages = data.get("messages") if isinstance(data, Mapping) else None
    last = messages[-1] if isinstance(messages, Sequence) and messages else None
    if isinstance(messages, Sequence) and isinstance(last, Mapping) and last.get("role") in ("user", "tool"):
        return PromptRow(parse_row({**data, "messages": [*messages, _PLACEHOLDER]}, place=place), has_answer=False)
    return PromptRow(parse_row(data, place=place), has_answer=True)


def read_prompt_rows(path: Path) -> list[PromptRow]:
    """Return the conversations of a JSONL file.

    Raises:
        InputError: If the file cannot be opened.
        RowsError: If any row is bad, or there is none.
    """
    found, errors = list[PromptRow](), list[RowError]()
    for item in scan_jsonl(path):
        try:
            if isinstance(item, RowError):
                raise item
            found.append(prompt_row(item[1], place=f"{path}:{item[0]}"))
        except RowError as error:
            errors.append(error)
    if not found and not errors:
        errors = [RowError("the file has no rows", place=str(path))]
    if errors:
        raise RowsError(errors, place=str(path))
    return found
