"""An encoded row without its texts: the ids of another text, with the same differences from mistral-common."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from pytest_mistral_lora.chat.diff import TokenDiff
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, Span
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.oracle.read_back import read_back
from pytest_mistral_lora.errors import MistralLoraError
from pytest_mistral_lora.report.scrubbed import SCHEMAS, Scrubber

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle import Oracle

_IDS = re.compile(r"(?:^|_)(?:input_ids|prompt_ids|chosen_ids|rejected_ids|labels)$")
_PER_TOKEN = re.compile(r"(?:mask|position_ids|seq_lengths|cu_seqlens|sequence_ids|seq_idx|loss_weights|length)$")
_MESSAGES = ("messages", "prompt", "chosen", "rejected", "tools")
_TEXTS = ("content", "text", "thinking")
_WORD, _OTHER_WORD = "x", "y"


class IdScrubber:
    """Replaces the texts of one encoded row.

    Columns that are unknown are left out: one of them may hold the text.
    """

    def __init__(self, oracle: Oracle) -> None:
        """Begin a row of the tokenizer that made its ids."""
        self._oracle = oracle
        self._scrubber = Scrubber(oracle)

    def encoded(self, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the record without its texts, in up to four ways; a finding may be lost in one, and stay in another.

        First, mistral-common's encoding of the scrubbed messages gets the differences that the ids have from that of
        the messages; without messages, from that of the conversation that is read back. Then each run of tokens of
        text becomes as many tokens of `x x x`, with messages of as many tokens, and without.
        """
        moved = self._moved(row)
        if moved is not None:
            yield moved
        found: dict[str, Any] = {}
        for key, value in row.items():
            if _IDS.search(key) and _are_integers(value):
                found[key] = self._runs(value)
                ids = row.get(key.replace("labels", "input_ids"))
                if "labels" in key and _are_integers(ids):
                    found[key] = _labels_for(self._runs(ids), ids, value, self._is_text, self._other)
            elif (key == "label" or _PER_TOKEN.search(key)) and _has_numbers_alone(value):
                found[key] = value
        messages = {key: self._counted(row[key], key) for key in _MESSAGES if key in row}
        if messages:
            yield {**messages, **found}
        yield found

    # the differences from mistral-common, in another text

    def _moved(self, row: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the row with the differences of its ids in another text; None if it is none of a conversation."""
        ids, labels = row.get("input_ids"), row.get("labels")
        if not _are_integers(ids) or not (labels is None or (_are_integers(labels) and len(labels) == len(ids))):
            return None
        columns = {key: value for key, value in row.items() if _PER_TOKEN.search(key) and _has_numbers_alone(value)}
        if not all(_is_mask(value, len(ids)) for value in columns.values()):
            return None  # positions and lengths would have to be made again
        with suppress(MistralLoraError):
            given = {key: row[key] for key in ("messages", "tools") if row.get(key)}
            [conversation] = parse_rows(given) if "messages" in given else [read_back(ids, self._oracle)]
            before = self._oracle.encode(conversation)
            scrubbed = self._scrubber.row(conversation.to_json())
            after = self._oracle.encode(scrubbed)
            if [span[:3] for span in before.spans] != [span[:3] for span in after.spans]:
                return None
            diff = TokenDiff.of((before.input_ids, None), (ids, None), self._oracle.piece)
            place = _Places(before.spans, after.spans)
            tokens = [*_moved_tokens(diff, ids, after.input_ids, place, self._replaced)]
            made, sources = [token.id for token in tokens], [token.source for token in tokens]
            found: dict[str, Any] = {key: scrubbed[key] for key in given if key in scrubbed}
            found["input_ids"] = made
            if labels is not None:
                found["labels"] = _labels_for(made, ids, labels, self._is_text, self._other, sources)
            return found | {key: [value[source] for source in sources] for key, value in columns.items()}
        return None

    def _replaced(self, token: int) -> int:
        """Return the token that stands for one that mistral-common does not have there."""
        return self._other if self._is_text(token) else token

    # runs of as many tokens

    def _runs(self, ids: Sequence[int]) -> list[int]:
        found: list[int] = []
        for is_text, run in groupby(ids, self._is_text):
            tokens = [*run]
            found += self._filler(len(tokens)) if is_text else tokens
        return found

    def _is_text(self, token: int) -> bool:
        return 0 <= token < self._oracle.vocab_size and token not in self._oracle.markers

    @property
    def _other(self) -> int:
        """A token of text that no scrubbed text has."""
        return self._oracle.encode_text(_OTHER_WORD)[-1]

    def _filler(self, tokens: int) -> list[int]:
        """Return the ids of `x x x`, as many as asked for."""
        ids = [*self._oracle.encode_text(" ".join([_WORD] * tokens))]
        return ids if len(ids) == tokens else [ids[-1]] * tokens

    def _counted(self, value: Any, key: str) -> Any:
        """Return messages whose texts have as many tokens as before; everything else as in a chat row."""
        if isinstance(value, list) and key not in SCHEMAS:
            return [self._counted(item, key) for item in value]
        if isinstance(value, dict) and key not in SCHEMAS:
            return {
                name: self._counted(item, name) if name in _TEXTS else self._scrubber.item(name, item, key, "row")[1]
                for name, item in value.items()
            }
        if isinstance(value, str) and key in (*_TEXTS, *_MESSAGES):
            return " ".join([_WORD] * len(self._oracle.encode_text(value)))
        return self._scrubber.value(value, key, "schema" if key in SCHEMAS else "row")


class _MovedToken(NamedTuple):
    """A token of a scrubbed row.

    Attributes:
        id: Its id.
        source: The index of the token that it stands for, whose label and masks it gets.
    """

    id: int
    source: int


class _Places:
    """Where a token of one encoding is in that of another text of the same spans.

    The first half of a span is counted from its start, and the second from its end, so that what is wrong at one of
    them stays there.
    """

    def __init__(self, before: Sequence[Span], after: Sequence[Span]) -> None:
        self._starts: list[int] = []
        for span, other in zip(before, after, strict=True):
            length, new = span.end - span.start, other.end - other.start
            middle = min(length // 2, new // 2)
            for at in range(length):
                from_end = max(other.end - (length - at), other.start + middle)
                self._starts.append(other.start + min(at, middle) if at < length // 2 else from_end)
        self._starts.append(after[-1].end if after else 0)

    def of(self, token: int) -> range:
        """Return the indices that stand for a token: none or several if the other text is shorter or longer."""
        return range(self._starts[token], self._starts[token + 1])


def _moved_tokens(
    diff: TokenDiff, ids: Sequence[int], other: Sequence[int], places: _Places, replaced: Callable[[int], int]
) -> Iterator[_MovedToken]:
    """Yield the tokens of another text with the differences that `ids` have from the expected ones."""
    for want, have in diff.all_pairs():
        if have is None:
            continue
        if want is not None and diff.expected.ids[want] == ids[have]:
            yield from (_MovedToken(other[at], have) for at in places.of(want))
        else:
            yield _MovedToken(replaced(ids[have]), have)


def _labels_for(
    made: Sequence[int],
    ids: Sequence[int],
    labels: Sequence[int],
    is_text: Callable[[int], bool],
    other: int,
    sources: Sequence[int] | None = None,
) -> list[int]:
    """Return the labels of scrubbed ids: a label that was the id beside it, or that of a neighbour, is so again.

    Args:
        made: The scrubbed ids.
        ids: The ids.
        labels: Their labels.
        is_text: Whether a token is one of text.
        other: The token that stands for any other one of text.
        sources: The index among `ids` of each scrubbed one; None if they are the same.
    """
    found = []
    for at, source in enumerate(range(len(made)) if sources is None else sources):
        label = labels[source] if source < len(labels) else IGNORE_INDEX
        shifts = (by for by in (0, 1, -1) if 0 <= source + by < len(ids) and ids[source + by] == label)
        by = next(shifts, None)
        if not is_text(label):
            found.append(label)
        elif by is None or not 0 <= at + by < len(made):
            found.append(other)
        else:
            found.append(made[at + by])
    return found


def _is_mask(values: Any, length: int) -> bool:
    return isinstance(values, list) and len(values) == length and all(value in (0, 1) for value in values)


def _are_integers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int for item in value)


def _has_numbers_alone(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_has_numbers_alone, value))
    return value is None or isinstance(value, bool | int | float)
