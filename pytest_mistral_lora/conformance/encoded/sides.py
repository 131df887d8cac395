"""The answers of a preference record, each made into a record of an encoded row: one prompt and one answer.

Trainers write such a record in these forms:

- DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`. In older releases, each name ends in `_input_ids`. A
  `chosen_mask` or `rejected_mask` is 0 at tokens of the answer that are not scored, such as the result of a tool;
- KTO: `prompt_ids`, `completion_ids`, and a `label` that is true if the answer is wanted. `KL_completion_ids` is
  left out: it is the answer of another row on purpose, and that row has it as its own;
- ORPO, CPO and older KTO: `chosen_input_ids` holds the prompt as well, and `chosen_labels` are its labels;
- reward models: `chosen_ids` and `rejected_ids` without a prompt are whole conversations, and have no labels.

An answer of the first two forms is scored token by token from its first token on, and its prompt is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.chat.diff import equal_beginning
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.fields import ROW_KEYS
from pytest_mistral_lora.chat.kinds.pair import PAIR
from pytest_mistral_lora.chat.kinds.preference import CHOSEN, REJECTED, UNWANTED, WANTED
from pytest_mistral_lora.chat.kinds.rated import RATED
from pytest_mistral_lora.chat.rows import RecordKind, unscored
from pytest_mistral_lora.conformance.encoded.integers import Ids, read_integers
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import NOWHERE, Place

_PAIR = (CHOSEN, REJECTED)
_ALONE = "completion"
_ENDINGS = ("_ids", "_input_ids")


@dataclass(frozen=True, slots=True)
class Side:
    """One answer of a preference record.

    Attributes:
        name: `chosen`, `rejected`, or `completion` for an answer that is judged by a label.
        column: The column of its ids.
        row_side: The side of its row, as its kind names it.
        prompt: The ids before the answer; empty if the record has whole conversations without labels.
        answer: The ids of the answer, its EOS included, without padding; of a whole conversation, all of its ids.
        has_labels: Whether tokens are trained on one by one; a reward model scores the conversation as a whole.
    """

    name: str
    column: str
    row_side: str
    prompt: Ids
    answer: Ids
    has_labels: bool = True

    @property
    def is_of_pair(self) -> bool:
        """Whether the record has a chosen and a rejected answer."""
        return self.name in _PAIR

    @property
    def kind(self) -> RecordKind:
        """The kind of the record."""
        return PAIR if self.is_of_pair else RATED


@dataclass(frozen=True, slots=True)
class SideRecord:
    """An answer, and the record of its encoded row.

    Attributes:
        side: The answer.
        record: `input_ids`, `labels`, and if the preference record has them `row`, `messages`, `tools` and an
            `attention_mask`.
    """

    side: Side
    record: Mapping[str, Any]


def has_sides(data: Mapping[str, Any]) -> bool:
    """Return whether a record has ids of answers in place of `input_ids`."""
    return data.get("input_ids") is None and any(_column(data, name) for name in (*_PAIR, _ALONE))


def split_sides(data: Mapping[str, Any], place: Place) -> list[SideRecord]:
    """Return the answers of a record: the chosen one and the rejected one, or the one that has a label.

    Args:
        data: The record, without the nulls of a table.
        place: Its place, for errors.

    Raises:
        RowError: If a column is missing, or is not a list of integers.
    """
    if not _column(data, _ALONE):
        return [_split_side(data, name, place, name) for name in _PAIR]
    label = data.get("label")
    if label is None:
        expected = "true for an answer that is wanted, false for one that is not"
        step = "A rollout has no label, and is not judged here."
        raise RowError("is missing", place=place / "label", expected=expected, next_step=step)
    if label not in (0, 1):
        raise RowError(f"{label!r:.80}", place=place / "label", expected="true or false")
    return [_split_side(data, _ALONE, place, WANTED if label else UNWANTED)]


def _split_side(data: Mapping[str, Any], name: str, place: Place, row_side: str) -> SideRecord:
    record = {key: data[key] for key in ("row", *ROW_KEYS) if key in data and key != "messages"}
    if messages := _messages(data, name):
        record["messages"] = messages
    column = _column(data, name) or f"{name}_ids"
    ids = _read(data, column, place)
    if data.get(f"{name}_labels") is not None:
        labels = _read(data, f"{name}_labels", place)
        trained = [n for n, label in enumerate(labels[: len(ids)]) if label != IGNORE_INDEX]
        start, end = (trained[0], trained[-1] + 1) if trained else (len(ids), len(ids))
        record |= _attention(data, name, ids, place)
        side = Side(name, column, row_side, _shown(ids[:start], record), ids[start:end])
    elif prompt_column := _column(data, "prompt"):
        prompt = _read(data, prompt_column, place)
        side = Side(name, column, row_side, prompt, ids)
        labels = (IGNORE_INDEX,) * len(prompt) + _masked(data, name, ids, place)
        ids = prompt + ids
    else:
        record |= _attention(data, name, ids, place)
        mask = record.get("attention_mask") or [1] * len(ids)
        # a reward model scores all tokens as a whole
        labels = tuple(token if is_shown else IGNORE_INDEX for token, is_shown in zip(ids, mask, strict=True))
        side = Side(name, column, row_side, (), _shown(ids, record), has_labels=False)
    return SideRecord(side, record | {"input_ids": list(ids), "labels": list(labels)})


def _attention(data: Mapping[str, Any], name: str, ids: Ids, place: Place) -> dict[str, Any]:
    """Return the attention mask of a side whose ids are the whole conversation, if it has one."""
    column = f"{name}_attention_mask"
    return {"attention_mask": list(_beside(data, column, ids, place))} if data.get(column) is not None else {}


def _shown(ids: Ids, record: Mapping[str, Any]) -> Ids:
    """Return the ids that the attention mask of a record does not hide, from the first one on; all without a mask."""
    mask = record.get("attention_mask")
    return ids if mask is None else tuple(token for token, is_shown in zip(ids, mask, strict=False) if is_shown)


def _masked(data: Mapping[str, Any], name: str, ids: Ids, place: Place) -> Ids:
    """Return the labels of an answer: its ids where its mask is 1, or all of them if it has none."""
    column = f"{name}_mask"
    if data.get(column) is None:
        return ids
    mask = _beside(data, column, ids, place)
    return tuple(token if is_trained else IGNORE_INDEX for token, is_trained in zip(ids, mask, strict=True))


def _column(data: Mapping[str, Any], name: str) -> str:
    """Return the column with the ids of a part of the record; empty if it has none."""
    columns = (f"{name}{ending}" for ending in _ENDINGS)
    return next((column for column in columns if data.get(column) is not None), "")


def _read(data: Mapping[str, Any], column: str, place: Place) -> Ids:
    return read_integers(data.get(column), place / column)


def _beside(data: Mapping[str, Any], column: str, ids: Ids, place: Place) -> Ids:
    """Return the values of a mask that has one for each id."""
    values = read_integers(data.get(column), place / column, mask=True)
    if len(values) != len(ids):
        found = f"{len(values)} values for {len(ids)} ids"
        raise RowError(found, place=place / column, expected="one for each id")
    return values


def _messages(data: Mapping[str, Any], name: str) -> list[Any]:
    """Return the messages of a side, with the weight 0 on each answer of the prompt; empty if they are not messages.

    Texts in place of messages are no conversation: their ids are read back.
    """
    answer = _message_list(data, name)
    prompt = _message_list(data, "prompt")
    if not answer or (not prompt and data.get("prompt")):
        return []
    if not prompt:
        # the prompt is what both sides begin with
        shared = _shared_beginning(answer, _message_list(data, _PAIR[name == "chosen"]))
        prompt, answer = answer[:shared], answer[shared:]
    return [*unscored(prompt), *answer]


def _message_list(data: Mapping[str, Any], key: str) -> Sequence[Mapping[str, Any]]:
    """Return the messages under a key; empty if the key has something else, such as a text."""
    from pytest_mistral_lora.formats.records import with_objects

    value = data.get(key)
    with suppress(RowError):  # a list of texts
        value = with_objects(value, NOWHERE / key)
    if isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
        return value
    return ()


def _shared_beginning(answer: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of messages that two conversations begin with, up to the last one that is not an answer."""
    return max(
        (n + 1 for n in range(equal_beginning(answer, other)) if answer[n].get("role") != "assistant"), default=0
    )
