"""One line of an encoded-rows file: conversations, ids and labels, checked for form before anything is judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.fields import kind_of
from pytest_mistral_lora.chat.oracle.mistral_common import Oracle
from pytest_mistral_lora.chat.reading.jsonl import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.encoded.parts import Fault
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


_PADS = ("<pad>", "[PAD]", "<unk>")


@dataclass(frozen=True, slots=True)
class Padding:
    """Which tokens of a line are padding.

    Attributes:
        real: Indices of the tokens that are not, in order.
        padded: Indices of those that are.
    """

    real: tuple[int, ...]
    padded: tuple[int, ...] = ()

    def faults(self, line: EncodedLine) -> Iterator[Fault]:
        """Yield what is wrong with the padding of the line."""
        inside = [n for n in self.padded if self.real and self.real[0] < n < self.real[-1]]
        if inside:
            found = f"{len(inside)} padding tokens stand between others, the first at token {inside[0]}"
            yield Fault("ML511", found, "padding at one end")
        trained = [n for n in self.padded if n < len(line.labels) and line.labels[n] != IGNORE_INDEX]
        if trained:
            found = f"{len(trained)} of {len(self.padded)} padding tokens are trained on, the first at {trained[0]}"
            yield Fault("ML510", found, "-100")


def padding_of(line: EncodedLine, expected: tuple[int, ...], oracle: Oracle) -> Padding:
    """Return what is padding: by the attention mask where it has zeros, else by what stands around the row.

    Args:
        line: The line.
        expected: The ids that the line should have without padding.
        oracle: Mistral's own tokenization.
    """
    ids, mask = line.input_ids, line.attention_mask
    everything = range(len(ids))
    if mask is not None and 0 in mask:
        return _apart(ids, [n for n in everything if mask[n] == 0])
    if ids == expected:
        return Padding(tuple(everything))
    exact = _around(line, expected, oracle)
    return _apart(ids, exact if exact is not None else _runs(line, oracle))


def _apart(ids: tuple[int, ...], padded: list[int]) -> Padding:
    pads = set(padded)
    return Padding(tuple(n for n in range(len(ids)) if n not in pads), tuple(padded))


def _around(line: EncodedLine, expected: tuple[int, ...], oracle: Oracle) -> list[int] | None:
    """Return the padding where without it the ids are the expected ones; None where they are not."""
    ids = line.input_ids
    extra = len(ids) - len(expected)
    if extra <= 0 or not expected:
        return None
    for padded in (range(len(expected), len(ids)), range(extra)):
        tokens = {ids[n] for n in padded}
        rest = ids[: len(expected)] if padded.start else ids[extra:]
        if rest == expected and len(tokens) == 1 and _can_pad(tokens.pop(), padded, line, oracle):
            return list(padded)
    pads = _pad_ids(oracle)
    inside = [n for n, token in enumerate(ids) if token in pads]
    return inside if tuple(token for token in ids if token not in pads) == expected else None


def _can_pad(token: int, padded: range, line: EncodedLine, oracle: Oracle) -> bool:
    """Return whether a run of a token beside a whole row is padding, not a second BOS or a second EOS."""
    if token == oracle.bos_id or (token not in oracle.control_tokens and token != oracle.unk_id):
        return False
    quiet = all(line.labels[n] == IGNORE_INDEX for n in padded if n < len(line.labels))
    return quiet or token in _pad_ids(oracle) or len(padded) > 1


def _runs(line: EncodedLine, oracle: Oracle) -> list[int]:
    """Return the padding of a row that is not what it should be: runs of a pad token, or of EOS, at its ends."""
    ids = line.input_ids
    pads = _pad_ids(oracle) | {oracle.eos_id}
    left = next((n for n, token in enumerate(ids) if token not in pads or token != ids[0]), len(ids))
    right = next((n for n, token in enumerate(reversed(ids)) if token not in pads or token != ids[-1]), len(ids))
    if right and ids[-1] == oracle.eos_id:
        right -= 1  # the last answer's own
    if left and ids[0] == oracle.eos_id and (left == len(ids) or ids[left] != oracle.bos_id):
        left = 0  # a row that was cut at the start may begin with EOS
    return [*range(min(left, len(ids) - right)), *range(len(ids) - right, len(ids))]


def _pad_ids(oracle: Oracle) -> set[int]:
    return {token for token, literal in oracle.control_tokens.items() if literal in _PADS} | {oracle.unk_id}
