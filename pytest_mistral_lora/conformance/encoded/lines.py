"""One line of an encoded-rows file: its conversations, ids and labels, parsed strictly; and its padding."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.fields import ROW_KEYS, kind_of
from pytest_mistral_lora.chat.formats import recognise
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.chat.rows import Row, parse_row
from pytest_mistral_lora.conformance.encoded import EncodingFault
from pytest_mistral_lora.errors import RowError

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedLine:
    """A line of an encoded-rows file.

    Attributes:
        place: File and line.
        index: The row's number in the source, from 0; the line's own number if it names none.
        rows: Its conversation; several if the sequence is packed.
        packed: Whether it has `conversations` in place of `messages`.
        input_ids: Token ids, padding included.
        labels: Labels; not necessarily as many as ids.
        position_ids: As many as ids, or None.
        attention_mask: As many as ids, 0 at padding, or None.
        error: The trainer's reason for encoding nothing; empty if it encoded the row.
        numbered: Whether it names its number.
    """

    place: str
    index: int
    rows: tuple[Row, ...]
    packed: bool = False
    input_ids: Ids = ()
    labels: Ids = ()
    position_ids: Ids | None = None
    attention_mask: Ids | None = None
    error: str = ""
    numbered: bool = False


def scan_lines(path: Path) -> Iterator[EncodedLine | RowError]:
    """Yield each line of an encoded-rows file, or the error that makes it unreadable.

    Raises:
        InputError: If the file cannot be opened.
    """
    count = -1
    for count, item in enumerate(scan_jsonl(path, encoded=True)):
        if isinstance(item, RowError):
            yield item
            continue
        line, data = item
        try:
            yield _parse_line(data, f"{path}:{line}", count)
        except RowError as error:
            yield error
    if count < 0:
        yield RowError("the file has no rows", place=str(path))


def _parse_line(data: Any, place: str, position: int) -> EncodedLine:
    if not isinstance(data, Mapping):
        raise RowError(f"a row is {kind_of(data)}", place=place, expected="an object with input_ids and labels")
    index = data.get("row", position)
    if type(index) is not int or index < 0:
        raise RowError(repr(index)[:80], place=f"{place}, row", expected="the row's number in the source, from 0")
    if "error" in data and "input_ids" not in data:
        try:
            rows = _parse_rows(data, place)
        except RowError:
            rows = ()  # a trainer may have refused the row because of this very field
        reason = str(data["error"])[:300] or "no reason is given"
        return EncodedLine(place, index, rows, error=reason, numbered="row" in data)
    if "input_ids" not in data:
        _refuse_rows(data, place)
    ids = _integers(data, "input_ids", place)
    beside: dict[str, Ids] = {}
    for key in ("position_ids", "attention_mask"):
        if data.get(key) is not None:
            values = beside[key] = _integers(data, key, place)
            if len(values) != len(ids):
                found = f"{len(values)} values for {len(ids)} ids"
                raise RowError(found, place=f"{place}, {key}", expected="one for each id")
    return EncodedLine(
        place,
        index,
        _parse_rows(data, place),
        packed="conversations" in data,
        input_ids=ids,
        # labels of another number than the ids are a finding (ML540), not a line that cannot be read
        labels=_integers(data, "labels", place),
        position_ids=beside.get("position_ids"),
        attention_mask=beside.get("attention_mask"),
        numbered="row" in data,
    )


def _refuse_rows(data: Mapping[str, Any], place: str) -> None:
    """Refuse a record of a format without ids by the format's name.

    Raises:
        RowError: If it is one that is known.
    """
    found = recognise(data)
    if found is not None:
        path = place.rpartition(":")[0]
        step = f"Judge the rows themselves: mistral-lora check {shlex.quote(path)} --tokenizer PATH"
        expected = "the row beside its ids: input_ids and labels"
        title = f"is missing: this is {found.title}"
        raise RowError(
            title,
            place=f"{place}, input_ids",
            expected=expected,
            next_step=found.next_step(path) if found.advice else step,
        )


def _parse_rows(data: Mapping[str, Any], place: str) -> tuple[Row, ...]:
    if "conversations" not in data:
        if data.get("messages") is None:
            # `parse_row` would take the line for a format of its own, and name another reader
            raise RowError(
                'no "messages"',
                place=place,
                expected='the row beside its ids: a list under "messages"',
                next_step="Write the row's messages into the line of its input_ids: the ids are compared with theirs.",
            )
        return (parse_row(data, place=place),)
    if "messages" in data:
        raise RowError("has messages and conversations", place=place, expected="one of them")
    given = data["conversations"]
    if not isinstance(given, list) or not given:
        found = "is empty" if given == [] else f"is {kind_of(given)}"
        raise RowError(found, place=f"{place}, conversations", expected="a list of lists of messages")
    # a conversation with tools of its own is an object, one that shares the line's tools a list of messages
    shared = {key: data[key] for key in ROW_KEYS if key in data}
    rows = [one if isinstance(one, Mapping) else shared | {"messages": one} for one in given]
    return tuple(parse_row(row, place=f"{place}, conversations[{n}]") for n, row in enumerate(rows))


def _integers(data: Mapping[str, Any], key: str, place: str) -> Ids:
    values = data.get(key)
    if not isinstance(values, list):
        found = "is missing" if values is None else f"is {kind_of(values)}"
        raise RowError(found, place=f"{place}, {key}", expected="a list of integers")
    for index, value in enumerate(values):
        # not isinstance: True is an int in Python, and no id
        if type(value) is not int:
            raise RowError(f"{value!r:.80}", place=f"{place}, {key}[{index}]", expected="an integer")
    return tuple(values)


# Tekken vocabularies have <pad>, and SentencePiece ones do not: collators pad with <unk> or a token they call [PAD].
_PADS = ("<pad>", "[PAD]", "<unk>")
_MOST_CLOSED = 2
"""More EOS behind an answer than these are padding: rows of many lengths are padded by more."""


@dataclass(frozen=True, slots=True)
class LinePadding:
    """The indices of a line's tokens, apart by padding or not.

    Attributes:
        real: Indices of the row's own tokens, in order.
        padded: Indices of the padding.
        hidden: Indices of the row's own tokens that the attention mask hides.
    """

    real: Ids
    padded: Ids = ()
    hidden: Ids = ()

    def faults(self, line: EncodedLine) -> Iterator[EncodingFault]:
        """Yield the rules that the padding of the line breaks."""
        inside = [n for n in self.padded if self.real and self.real[0] < n < self.real[-1]]
        if inside:
            found = f"{len(inside)} padding tokens stand between others, the first at token {inside[0]}"
            yield EncodingFault("ML511", found, "padding at one end")
        trained = [n for n in self.padded if n < len(line.labels) and line.labels[n] != IGNORE_INDEX]
        if trained:
            found = f"{len(trained)} of {len(self.padded)} padding tokens are trained on, the first at {trained[0]}"
            yield EncodingFault("ML510", found, "-100")
        if self.hidden:
            tokens = {line.input_ids[n] for n in self.hidden}
            named = f"with the id {tokens.pop()}" if len(tokens) == 1 else f"with {len(tokens)} ids"
            found = (
                f"the attention mask hides {len(self.hidden)} tokens of the row {named}, the first at {self.hidden[0]}"
            )
            yield EncodingFault("ML552", found, "1 at each token of the row")
        # the row may attend to padding before it; that behind it is never attended to
        before = [n for n in self.padded if self.real and n < self.real[0]]
        mask, positions = line.attention_mask, line.position_ids
        if mask is not None:
            own = {mask[n] for n in self.real}
            before = [n for n in before if mask[n] in own - {0}]
        elif positions is not None and self.real and positions[self.real[0]] == 0:
            before = []  # without a mask, positions that start anew begin a sequence of their own
        if before:
            given = "no attention mask hides them" if mask is None else "the attention mask does not hide them"
            found = f"{len(before)} padding tokens stand before the row, and {given}"
            yield EncodingFault("ML519", found, "an attention_mask of 0 at padding")


def find_padding(line: EncodedLine, expected: Ids, oracle: Oracle) -> LinePadding:
    """Find the padding of a line: by zeros in its attention mask, or else by the tokens around the row.

    Args:
        line: The line.
        expected: The ids that the line should have without padding.
        oracle: Mistral's own tokenization.
    """
    ids, mask = line.input_ids, line.attention_mask
    # Many collators write a mask of ones, or none at all: a mask without a zero does not prove that nothing is padded.
    pads = {token for token, literal in oracle.control_tokens.items() if literal in _PADS} | {oracle.unk_id}
    exact = [] if ids == expected else _padding_of_sound_row(line, expected, pads, oracle)
    hidden: list[int] = []
    if mask is not None and 0 in mask:
        zeros = [n for n in range(len(ids)) if mask[n] == 0]
        padded = zeros
        # a mask that was made of the ids hides each token of the row that has the id of padding
        if exact is not None and tuple(ids[n] for n in range(len(ids)) if mask[n]) != expected:
            padded, hidden = exact, sorted(set(zeros).difference(exact))
    else:
        padded = exact if exact is not None else _padding_of_other_row(line, pads, oracle)
    real = set(range(len(ids))).difference(padded)
    return LinePadding(tuple(sorted(real)), tuple(padded), tuple(hidden))


def _padding_of_sound_row(line: EncodedLine, expected: Ids, pads: set[int], oracle: Oracle) -> list[int] | None:
    """Return the padding if the ids without it are the expected ones, else None."""
    ids = line.input_ids
    extra = len(ids) - len(expected)
    if extra <= 0 or not expected:
        return None
    for padded in (range(len(expected), len(ids)), range(extra)):
        tokens = {ids[n] for n in padded}
        rest = ids[: len(expected)] if padded.start else ids[extra:]
        if rest != expected or len(tokens) != 1:
            continue
        [token] = tokens
        # One more BOS, or an EOS or two more that are trained on, are a fault of the template and not padding.
        can_pad = token != oracle.bos_id and (token in oracle.control_tokens or token == oracle.unk_id)
        quiet = all(line.labels[n] == IGNORE_INDEX for n in padded if n < len(line.labels))
        if can_pad and (quiet or token in pads or len(padded) > _MOST_CLOSED):
            return list(padded)
    # padding between the turns, which ML511 reports
    inside = [n for n, token in enumerate(ids) if token in pads]
    return inside if tuple(token for token in ids if token not in pads) == expected else None


def _padding_of_other_row(line: EncodedLine, pads: set[int], oracle: Oracle) -> list[int]:
    """Return the runs of a pad token, or of EOS, at the ends of a row whose own tokens have faults."""
    pads, ids = pads | {oracle.eos_id}, line.input_ids
    left = next((n for n, token in enumerate(ids) if token not in pads or token != ids[0]), len(ids))
    right = next((n for n, token in enumerate(reversed(ids)) if token not in pads or token != ids[-1]), len(ids))
    if right and ids[-1] == oracle.eos_id:
        right -= 1  # the last answer's own
        # one or two more that are trained on are EOS too many, and not padding
        if right <= _MOST_CLOSED and set(line.labels[len(ids) - right : len(ids)]) == {oracle.eos_id}:
            right = 0
    if left and ids[0] == oracle.eos_id and (left == len(ids) or ids[left] != oracle.bos_id):
        left = 0  # a row that was cut at the start may begin with EOS
    return [*range(min(left, len(ids) - right)), *range(len(ids) - right, len(ids))]
