"""One line of an encoded-rows file: conversations, ids and labels, checked for form before anything is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.fields import kind_of
from pytest_mistral_lora.chat.jsonl import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.errors import RowError

Ints = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedLine:
    """A line of an encoded-rows file.

    Attributes:
        place: File and line.
        index: The row's number in the source, from 0; the line's own number where it names none.
        rows: Its conversation; several where the sequence is packed.
        packed: Whether it has `conversations` in place of `messages`.
        input_ids: Token ids, padding included.
        labels: Labels; their number is not checked.
        position_ids: As many as ids, or None.
        attention_mask: As many as ids, 0 at padding, or None.
        error: Why the trainer made nothing of the row; empty where it made something.
        numbered: Whether it names its number.
    """

    place: str
    index: int
    rows: tuple[Row, ...]
    packed: bool = False
    input_ids: Ints = ()
    labels: Ints = ()
    position_ids: Ints | None = None
    attention_mask: Ints | None = None
    error: str = ""
    numbered: bool = False


def scan_lines(path: Path) -> Iterator[EncodedLine | RowError]:
    """Yield each line of an encoded-rows file, or the error that makes it unreadable.

    Raises:
        InputError: If the file cannot be opened.
    """
    count = -1
    for count, item in enumerate(scan_jsonl(path)):
        if isinstance(item, RowError):
            yield item
            continue
        line, data = item
        try:
            yield _parse(data, f"{path}:{line}", count)
        except RowError as error:
            yield error
    if count < 0:
        yield RowError("the file has no rows", place=str(path))


def _parse(data: Any, place: str, position: int) -> EncodedLine:
    if not isinstance(data, Mapping):
        raise RowError(f"a row is {kind_of(data)}", place=place, expected="an object with input_ids and labels")
    index = data.get("row", position)
    if type(index) is not int or index < 0:
        raise RowError(repr(index)[:80], place=f"{place}, row", expected="the row's number in the source, from 0")
    if "error" in data and "input_ids" not in data:
        reason = str(data["error"])[:300] or "no reason is given"
        return EncodedLine(place, index, _rows_of_error(data, place), error=reason, numbered="row" in data)
    ids = _integers(data, "input_ids", place)
    return EncodedLine(
        place,
        index,
        _rows(data, place),
        "conversations" in data,
        ids,
        _integers(data, "labels", place),
        _beside(data, "position_ids", place, len(ids)),
        _beside(data, "attention_mask", place, len(ids)),
        numbered="row" in data,
    )


def _rows_of_error(data: Mapping[str, Any], place: str) -> tuple[Row, ...]:
    """Return the conversations of a row that the trainer refused, where it says them in a form that can be read."""
    try:
        return _rows(data, place)
    except RowError:
        return ()


def _rows(data: Mapping[str, Any], place: str) -> tuple[Row, ...]:
    if "conversations" not in data:
        return (parse_row(data, place=place),)
    if "messages" in data:
        raise RowError("has messages and conversations", place=place, expected="one of them")
    given = data["conversations"]
    if not isinstance(given, list) or not given:
        found = "is empty" if given == [] else f"is {kind_of(given)}"
        raise RowError(found, place=f"{place}, conversations", expected="a list of lists of messages")
    return tuple(_conversation(one, data, f"{place}, conversations[{n}]") for n, one in enumerate(given))


def _conversation(given: Any, data: Mapping[str, Any], place: str) -> Row:
    """Return one conversation of a packed sequence: its messages, or an object with messages and tools."""
    if isinstance(given, Mapping):
        return parse_row(given, place=place)
    return parse_row({"messages": given, "tools": data.get("tools")}, place=place)


def _beside(data: Mapping[str, Any], key: str, place: str, length: int) -> Ints | None:
    if data.get(key) is None:
        return None
    values = _integers(data, key, place)
    if len(values) != length:
        raise RowError(f"{len(values)} values for {length} ids", place=f"{place}, {key}", expected="one for each id")
    return values


def _integers(data: Mapping[str, Any], key: str, place: str) -> Ints:
    values = data.get(key)
    if not isinstance(values, list):
        found = "is missing" if values is None else f"is {kind_of(values)}"
        raise RowError(found, place=f"{place}, {key}", expected="a list of integers")
    for index, value in enumerate(values):
        if type(value) is not int:
            raise RowError(f"{value!r:.80}", place=f"{place}, {key}[{index}]", expected="an integer")
    return tuple(values)
