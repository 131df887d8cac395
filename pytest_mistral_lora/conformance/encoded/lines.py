"""One record of encoded rows: its conversations, ids and labels, parsed strictly; and its padding.

The records are the lines of a file, or those of any other container: a table, a JSON array, a saved dataset.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.fields import ROW_KEYS, kind_of
from pytest_mistral_lora.chat.kinds.conversation import CONVERSATION
from pytest_mistral_lora.chat.kinds.records import as_side, parse_as, record_kind
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading.row_source import RowSource, SourceRecord
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.encoded.columns import (
    LENGTHS,
    MASKS,
    WEIGHTS,
    mask_faults,
    numbers_of,
    value_faults,
)
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault
from pytest_mistral_lora.conformance.encoded.integers import Ids, read_integers
from pytest_mistral_lora.conformance.encoded.sides import Side, has_sides, split_sides
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.declared_keys import declared_values
from pytest_mistral_lora.formats.recognition import recognise
from pytest_mistral_lora.places import NOWHERE, Place, file_of


@dataclass(frozen=True, slots=True)
class EncodedLine:
    """A record of encoded rows: a line of a file, or a row of a table.

    Attributes:
        place: File and line, or file and row.
        index: The row's number in the source, from 0; the line's own number if it names none.
        rows: Its conversation; several if the sequence is packed; empty if the line has ids alone.
        as_stored: The same with a table's nulls in the arguments of calls, if it has any.
        packed: Whether it has `conversations` in place of `messages`.
        input_ids: Token ids, padding included.
        labels: Labels; not necessarily as many as ids.
        masks: Its masks among `MASKS`, by key; as many values as ids.
        lengths: The ends of its conversations by each key of `LENGTHS` that it has, from 0 on.
        position_ids: As many as ids, or None. If only lengths are given, those that they make.
        attention_mask: As many as ids, 0 at padding, or None.
        numbers: The number of each token's conversation by each key of `NUMBERS` that it has.
        faults: Values beside its ids that no trainer can use.
        error: The trainer's reason for encoding nothing; empty if it encoded the row.
        numbered: Whether it names its number.
        masked: Whether its labels come from the masks.
        few_shot: The number of examples in a prompt of an evaluation; None for a row of a trainer.
        side: The answer of a preference record that it is; None for a row of its own.
        chosen: The line of the chosen answer, if it is the rejected one of the same record.
        declared: What the record has under the keys of `DECLARED_KEYS`.
    """

    place: Place
    index: int
    rows: tuple[Row, ...]
    as_stored: tuple[Row, ...] = ()
    packed: bool = False
    input_ids: Ids = ()
    labels: Ids = ()
    masks: Mapping[str, Ids] = field(default_factory=dict)
    lengths: Mapping[str, Ids] = field(default_factory=dict)
    position_ids: Ids | None = None
    attention_mask: Ids | None = None
    numbers: Mapping[str, Ids] = field(default_factory=dict)
    faults: tuple[EncodingFault, ...] = ()
    error: str = ""
    numbered: bool = False
    masked: bool = False
    few_shot: int | None = None
    side: Side | None = None
    chosen: EncodedLine | None = None
    declared: tuple[tuple[str, Any], ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that say what is trained on."""
        if self.side is not None:
            return (self.side.column,)
        return (*(() if self.masked else ("labels",)), *self.masks)


@dataclass(frozen=True, slots=True)
class TakenLine:
    """What the sequence of lines needs of one of them.

    Attributes:
        index: Its number in the source.
        place: Its place.
        numbered: Whether it names its number.
        packed: Whether it has several conversations.
        error: The trainer's reason for encoding nothing; may be empty.
        is_second: Whether it is the rejected side of a pair.
        shown: The row as one line of JSON, if the trainer encoded nothing.
    """

    index: int
    place: Place
    numbered: bool
    packed: bool
    error: str
    is_second: bool
    shown: str = ""

    @classmethod
    def of(cls, line: EncodedLine) -> TakenLine:
        """Return the parts of a line."""
        shown = line.rows[0].to_jsonl() if line.error and line.rows else ""
        return cls(
            line.index,
            line.place,
            line.numbered,
            line.packed,
            line.error,
            is_second=line.chosen is not None,
            shown=shown,
        )


def scan_lines(
    source: RowSource, progress: Callable[[int], None] = lambda read: None, *, has_source: bool = False
) -> Iterator[EncodedLine | RowError]:
    """Yield each record of encoded rows, or the error of an unreadable one; a preference record is a line a side.

    Args:
        source: The records.
        progress: Called with the number of bytes read since the last call.
        has_source: Whether a dataset beside them has the messages of a record without messages.

    Raises:
        InputError: If the source cannot be read.
    """
    number = 0
    for record in source.records(progress):
        yield from lines_of([record], number, has_source=has_source)
        number += 1
    if not number:
        yield RowError(
            "there are no rows" if source.place.source.is_value else "the file has no rows", place=source.place
        )


def lines_of(
    records: Iterable[SourceRecord], first: int, *, has_source: bool = False
) -> Iterator[EncodedLine | RowError]:
    """Yield the lines of some records, as `scan_lines` does.

    Args:
        records: The records.
        first: The number of records before them.
        has_source: As for `scan_lines`.
    """
    for number, record in enumerate(records, start=first):
        try:
            value = record.value
            if isinstance(value, RowError):
                raise value
            yield from _RecordReader(record.place, record.is_padded, has_source).lines(value, number)
        except RowError as error:
            yield error


def has_row(record: Mapping[str, Any]) -> bool:
    """Return whether the messages of a table's record can be read as a row."""
    from pytest_mistral_lora.formats.records import plain_row, unpadded_calls

    try:
        parse_as(CONVERSATION, unpadded_calls(plain_row(record, NOWHERE, padded=True)))
    except RowError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class _RecordReader:
    """The reader of one record.

    Attributes:
        place: The place of the record.
        padded: Whether absent keys are null, as in a table of Arrow.
        has_source: Whether the source has the messages of a record without messages.
    """

    place: Place
    padded: bool
    has_source: bool

    def lines(self, record: Any, position: int) -> Sequence[EncodedLine]:
        """Return the lines of a record: two if it is a pair, or else one."""
        if not isinstance(record, Mapping):
            expected = "an object with input_ids and labels"
            raise RowError(f"a row is {kind_of(record)}", place=self.place, expected=expected)
        if not has_sides(record):
            return (self.line(record, position),)
        lines: list[EncodedLine] = []
        sides = split_sides(record, self.place)
        for given in sides:
            place = self.place / given.side.name if len(sides) > 1 else self.place
            line = replace(self, place=place).line(given.record, position)
            rows, as_stored = (
                tuple(as_side(row, given.side.row_side) for row in stored) for stored in (line.rows, line.as_stored)
            )
            chosen = lines[0] if lines else None
            faults = (*line.faults, *mask_faults(record, f"{given.side.name}_mask"))
            line = replace(line, rows=rows, as_stored=as_stored, faults=faults)
            lines.append(replace(line, side=given.side, chosen=chosen))
        return lines

    def line(self, record: Mapping[str, Any], position: int) -> EncodedLine:
        from pytest_mistral_lora.formats.records import plain_row, unpadded_calls

        place = self.place
        data = plain_row(record, place, padded=self.padded)
        index = data.get("row", position)
        if type(index) is not int or index < 0:
            raise RowError(repr(index)[:80], place=place / "row", expected="the row's number in the source, from 0")
        if "error" in data and "input_ids" not in data:
            try:
                rows = self._rows(data)
            except RowError:
                rows = ()  # a trainer may have refused the row because of this field
            reason = str(data["error"])[:300] or "no reason is given"
            return EncodedLine(place, index, rows, error=reason, numbered="row" in data, few_shot=_few_shot(data))
        if "input_ids" not in data:
            self._refuse_rows(data)
        ids = self._integers(data, "input_ids")
        unpadded = unpadded_calls(data) if self.padded else data
        rows = self._rows(unpadded)
        masks = self._beside(data, MASKS, ids)
        lengths = {key: self._ends(data, key) for key in LENGTHS if data.get(key) is not None}
        beside = self._beside(data, ("position_ids", "attention_mask"), ids)
        if lengths and "position_ids" not in beside:
            beside["position_ids"] = _positions(next(iter(lengths.values())), len(ids))
        # labels and ids of different numbers are a finding (ML540), not an unreadable line
        labels = self._integers(data, "labels") if data.get("labels") is not None or not masks else _masked(ids, masks)
        return EncodedLine(
            place,
            index,
            rows,
            as_stored=self._rows(data) if unpadded != data else (),
            packed=_has_conversations(data),
            input_ids=ids,
            labels=labels,
            masks=masks,
            lengths=lengths,
            numbered="row" in data,
            masked=data.get("labels") is None,
            numbers=numbers_of(data, len(ids)),
            faults=tuple(value_faults(data, len(ids))),
            few_shot=_few_shot(data),
            declared=declared_values(data),
            **beside,
        )

    def _beside(self, data: Mapping[str, Any], keys: Sequence[str], ids: Ids) -> dict[str, Any]:
        """Return the values of some keys that a record has for each of its ids."""
        beside: dict[str, Ids] = {}
        for key in keys:
            if data.get(key) is not None:
                values = beside[key] = read_integers(
                    data[key], self.place / key, weights=key == WEIGHTS, mask=key not in (WEIGHTS, "position_ids")
                )
                if len(values) != len(ids):
                    found = f"{len(values)} values for {len(ids)} ids"
                    raise RowError(found, place=self.place / key, expected="one for each id")
        return beside

    def _refuse_rows(self, data: Mapping[str, Any]) -> None:
        """Refuse a record of a known format without ids, and name the format.

        Raises:
            RowError: If the record has a known format.
        """
        found = recognise(data)
        if found is not None:
            path = file_of(self.place)
            step = f"Judge the rows themselves: mistral-lora check {shlex.quote(path)} --tokenizer PATH" if path else ""
            raise RowError(
                f"is missing: this is {found.title}",
                place=self.place / "input_ids",
                expected="the row beside its ids: input_ids and labels",
                next_step=found.next_step(path) if found.advice else step,
            )

    def _rows(self, data: Mapping[str, Any]) -> tuple[Row, ...]:
        """Return the conversations of a record; empty if it has ids alone."""
        if not _has_conversations(data):
            if data.get("messages") is not None or not record_kind(data).is_chat:
                return _single_rows(data, self.place)
            if self.has_source and _packs(data):
                raise RowError(
                    'no "messages", and the sequence is packed: it does not tell which rows of the dataset it holds',
                    place=self.place,
                    expected='its rows beside its ids: a list of lists of messages under "conversations"',
                    next_step="Prepare the dataset without packing, or leave the dataset out, and the ids are read "
                    "back.",
                )
            return ()
        if "messages" in data:
            raise RowError("has messages and conversations", place=self.place, expected="one of them")
        given, place = data["conversations"], self.place / "conversations"
        if not isinstance(given, list) or not given:
            shown = "is empty" if given == [] else f"is {kind_of(given)}"
            raise RowError(shown, place=place, expected="a list of lists of messages")
        # a conversation with its own tools is an object; one with the line's tools is a list of messages
        shared = {key: data[key] for key in ROW_KEYS if key in data}
        records = [record if isinstance(record, Mapping) else shared | {"messages": record} for record in given]
        return tuple(row for n, record in enumerate(records) for row in _single_rows(record, place / n))

    def _ends(self, data: Mapping[str, Any], key: str) -> Ids:
        """Return the ends of the conversations of a packed sequence, from 0 on."""
        values = self._integers(data, key)
        ends = values if key == "cu_seqlens" else tuple(accumulate(values, initial=0))
        if not ends or ends[0] or any(before > after for before, after in pairwise(ends)):
            expected = "numbers that go up from 0" if key == "cu_seqlens" else "the length of each conversation"
            raise RowError(f"{list(values)!r:.80}", place=self.place / key, expected=expected)
        return ends

    def _integers(self, data: Mapping[str, Any], key: str) -> Ids:
        """Return the integers of a key."""
        values, place = data.get(key), self.place / key
        if values is None and key == "labels":
            found = "is missing, and so is a mask that they could be made of: each token of such a row is trained on"
            step = "Save the labels that your collator makes, or prepare the dataset with assistant_only_loss=True."
            raise RowError(found, place=place, expected=f"a list of integers, or {MASKS[0]}", next_step=step)
        return read_integers(values, place)


def _single_rows(record: Mapping[str, Any], place: Place) -> tuple[Row, ...]:
    """Return the row of a record that no preference is: a conversation, or a row of a kind without turns."""
    kind = record_kind(record)
    return parse_as(CONVERSATION if kind.is_chat else kind, record, place)


def _has_conversations(data: Mapping[str, Any]) -> bool:
    """Return whether a record has a list of conversations; ShareGPT has the messages of one under the same key."""
    given = data.get("conversations")
    found = recognise({"conversations": given}) if given and "messages" not in data else None
    return "conversations" in data and found is None


def _few_shot(data: Mapping[str, Any]) -> int | None:
    """Return the number of examples in a prompt of an evaluation, as `runners.prompts` writes it."""
    facts = data.get("evaluation")
    found = facts.get("few_shot") if isinstance(facts, Mapping) else None
    return found if type(found) is int else None


def _packs(data: Mapping[str, Any]) -> bool:
    """Return whether a record is a sequence of several rows, with their lengths."""
    lengths = data.get("seq_lengths")
    return isinstance(lengths, Sequence) and len(lengths) > 1


def _positions(ends: Ids, count: int) -> Ids:
    """Return position ids that restart at each end of a conversation; tokens behind the last end count on."""
    # a length may be any number, and no more positions than tokens are made of it
    within = [min(end, count) for end in ends]
    inner = [n for start, end in pairwise(within) for n in range(end - start)]
    return tuple(inner) + tuple(range(count - len(inner)))


def _masked(ids: Ids, masks: Mapping[str, Ids]) -> Ids:
    """Return the labels of a row that has masks: the ids where each mask is 1."""
    return tuple(token if all(ones) else IGNORE_INDEX for token, *ones in zip(ids, *masks.values(), strict=True))


# Tekken vocabularies have <pad>, and SentencePiece ones do not: collators pad with <unk> or a token named [PAD].
_PADS = ("<pad>", "[PAD]", "<unk>")
_MOST_CLOSED = 2
"""Most EOS after an answer that are not padding: padded rows of different lengths have more."""


@dataclass(frozen=True, slots=True)
class LinePadding:
    """The indices of a line's tokens, divided into row and padding.

    Attributes:
        real: Indices of the row's own tokens, in order.
        padded: Indices of the padding.
        hidden: Indices of the row's own tokens that the attention mask hides.
    """

    real: Ids
    padded: Ids = ()
    hidden: Ids = ()

    def faults(self, line: EncodedLine) -> Iterator[EncodingFault]:
        """Yield the rules that the line's padding breaks."""
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
            named = f", each with the id {tokens.pop()}" if len(tokens) == 1 else ""
            found = f"the attention mask hides {len(self.hidden)} of the {len(self.real)} tokens of the row{named}"
            found += f"; the first is token {self.hidden[0]}"
            yield EncodingFault("ML552", found, "1 at each token of the row")
        # the row may attend to padding before it, but never to padding after it
        before = [n for n in self.padded if self.real and n < self.real[0]]
        mask, positions = line.attention_mask, line.position_ids
        if mask is not None:
            row_values = {mask[n] for n in self.real}
            before = [n for n in before if mask[n] in row_values - {0}]
        elif positions is not None and self.real and positions[self.real[0]] == 0:
            before = []  # without a mask, restarting positions begin a new sequence
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
    # Many collators write a mask of ones, or no mask: a mask without a zero does not prove that nothing is padded.
    pads = _pads_of(line, oracle)
    exact = [] if ids == expected else _padding_of_sound_row(line, expected, pads, oracle)
    hidden: list[int] = []
    if mask is not None and 0 in mask:
        zeros = [n for n in range(len(ids)) if mask[n] == 0]
        padded = zeros
        # a mask made from the ids hides every token of the row with the id of the padding
        if exact is not None and tuple(ids[n] for n in range(len(ids)) if mask[n]) != expected:
            padded, hidden = exact, sorted(set(zeros).difference(exact))
    else:
        padded = exact if exact is not None else _padding_of_other_row(line, pads, oracle)
    if not padded:
        return LinePadding(tuple(range(len(ids))), (), tuple(hidden))
    real = set(range(len(ids))).difference(padded)
    return LinePadding(tuple(sorted(real)), tuple(padded), tuple(hidden))


def _pads_of(line: EncodedLine, oracle: Oracle) -> set[int]:
    """Return the ids that pad a line: those that Mistral's vocabularies have, and a token added for it.

    No text is encoded to an id behind the vocabulary. At an end of the line and without a loss, it is padding.
    """
    pads = {oracle.control_ids[literal] for literal in _PADS if literal in oracle.control_ids} | {oracle.unk_id}
    ends = [(line.input_ids[n], line.labels[n]) for n in (0, -1)] if line.input_ids and line.labels else []
    return pads | {token for token, label in ends if token >= oracle.vocab_size and label == IGNORE_INDEX}


def likely_tokens(line: EncodedLine, oracle: Oracle) -> Ids:
    """Return the indices of the tokens of a line that are probably not padding, if its row is not known.

    Args:
        line: The line.
        oracle: Mistral's own tokenization.
    """
    ids, mask = line.input_ids, line.attention_mask or ()
    pads = _pads_of(line, oracle) - {oracle.unk_id}
    padded = {*_padding_of_other_row(line, pads | {oracle.unk_id}, oracle)}
    hidden = [n for n, value in enumerate(mask) if value == 0] if 0 in mask else []
    first = next((n for n, value in enumerate(mask) if value), len(ids)) if hidden else 0
    last = next((n for n in reversed(range(len(mask))) if mask[n]), -1) if hidden else 0
    for run in ([n for n in hidden if n < first], [n for n in hidden if n > last]):
        # a mask may also hide tokens of the row, which ML552 reports
        tokens = {ids[n] for n in run}
        if len(tokens) == 1 and oracle.bos_id not in tokens:
            padded.update(run)
    # padding between the turns, which ML511 reports
    padded.update(n for n in hidden if ids[n] == oracle.unk_id)
    if not padded and pads.isdisjoint(ids):
        return tuple(range(len(ids)))
    return tuple(n for n, token in enumerate(ids) if n not in padded and token not in pads)


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
        # An extra BOS, or one or two extra supervised EOS, are a fault of the template and not padding.
        can_pad = token in pads or (token != oracle.bos_id and token in oracle.control_tokens)
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
        # one or two supervised extra EOS are a fault, not padding
        if right <= _MOST_CLOSED and set(line.labels[len(ids) - right : len(ids)]) == {oracle.eos_id}:
            right = 0
    if left and ids[0] == oracle.eos_id and (left == len(ids) or ids[left] != oracle.bos_id):
        left = 0  # a row cut at the start may begin with EOS
    return [*range(min(left, len(ids) - right)), *range(len(ids) - right, len(ids))]
