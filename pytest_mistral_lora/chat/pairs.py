"""Preference pairs and rated answers, in TRL's form: an answer that is wanted, and one that is not, to one prompt.

A pair is `{"prompt": [messages], "chosen": [messages], "rejected": [messages]}`, and a rated answer is
`{"prompt": [messages], "completion": [messages], "label": true|false}`, each with the settings of a row. Each answer
becomes a row: the messages of the prompt, whose answers have weight 0, and those of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.fields import check_message, error_at, refuse_keys, refuse_near_misses
from pytest_mistral_lora.chat.rows import Row, row_settings, unscored, weight_of
from pytest_mistral_lora.places import Place

CHOSEN, REJECTED, WANTED, UNWANTED = "chosen", "rejected", "wanted", "unwanted"
SIDES = (CHOSEN, REJECTED, WANTED, UNWANTED)
"""The sides of a record: both answers of a pair, then a rated answer by its label."""

FEWEST_ANSWERS = 10
"""Fewest answers of each side whose lengths are compared."""
_LONGER = 1.25
"""A side is longer if its mean and its median are these times the other side's."""


class AnswerLengths(NamedTuple):
    """The lengths of the answers of one side, in tokens.

    Attributes:
        answers: Number of answers.
        mean: Their mean.
        median: Their median.
    """

    answers: int
    mean: float
    median: float


def longer_side(first: AnswerLengths, second: AnswerLengths) -> int | None:
    """Return the index of the side whose lengths tell it apart; None if they do not, or of few answers."""
    if min(first.answers, second.answers) < FEWEST_ANSWERS:
        return None
    for index, (longer, shorter) in enumerate(((first, second), (second, first))):
        if longer.mean >= _LONGER * shorter.mean and longer.median >= _LONGER * shorter.median:
            return index
    return None


def is_pair(record: Mapping[str, Any]) -> bool:
    """Return whether a record has the keys and the lists of a pair."""
    return all(_is_list(record.get(key)) for key in ("prompt", CHOSEN, REJECTED))


def is_rated(record: Mapping[str, Any]) -> bool:
    """Return whether a record has the keys, the lists and the label of a rated answer."""
    return all(_is_list(record.get(key)) for key in ("prompt", "completion")) and isinstance(record.get("label"), bool)


def is_wanted(row: Row) -> bool:
    """Return whether the answer of a row is one that the model should give: every answer but a worse or a bad one."""
    return row.side not in (REJECTED, UNWANTED)


def answer_start(row: Row) -> int:
    """Return the index of the first message of the answer of a side: the first answer that is scored."""
    return next(
        index for index, message in enumerate(row.messages) if message["role"] == "assistant" and weight_of(message)
    )


def prompt_of(row: Row) -> Row:
    """Return a side without its answer."""
    return replace(row, messages=row.messages[: answer_start(row)])


def answer_of(row: Row) -> Row:
    """Return a side without its prompt."""
    return replace(row, messages=row.messages[answer_start(row) :])


def record_of(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the record of both sides of a pair, or of a rated answer: what `parse_pair` and `parse_rated` read."""
    first = rows[0].to_json()
    prompt = prompt_of(rows[0]).messages
    record: dict[str, Any] = {
        "prompt": [{key: value for key, value in message.items() if key != "weight"} for message in prompt]
    }
    for row in rows:
        key = row.side if row.side in (CHOSEN, REJECTED) else "completion"
        record[key] = [dict(message) for message in answer_of(row).messages]
        if key == "completion":
            record["label"] = row.side == WANTED
    return record | {key: value for key, value in first.items() if key != "messages"}


def rated(rows: Sequence[Row]) -> list[Row]:
    """Return the sides of a pair as rated answers: the chosen one is wanted, and the rejected one is not."""
    return [replace(row, side=WANTED if row.side == CHOSEN else UNWANTED) for row in rows]


def parse_pair(data: Mapping[str, Any], place: Place) -> tuple[Row, ...]:
    """Check a pair, and return the rows of both sides; their places end with the side.

    Raises:
        RowError: With the field and the value, if it is faulty.
    """
    return tuple(_row(data, key, key, place, place / key) for key in (CHOSEN, REJECTED))


def parse_rated(data: Mapping[str, Any], place: Place) -> tuple[Row, ...]:
    """Check a rated answer, and return its row.

    Raises:
        RowError: With the field and the value, if it is faulty.
    """
    return (_row(data, "completion", WANTED if data["label"] else UNWANTED, place, place),)


def _row(data: Mapping[str, Any], key: str, side: str, place: Place, row_place: Place) -> Row:
    """Return the row of the answer under a key.

    Args:
        data: The record.
        key: The key of the answer.
        side: The side.
        place: The place of the record.
        row_place: The place of the row.
    """
    refuse_near_misses(data, place)
    refuse_keys(data, place)
    prompt, answer = (_checked_messages(data[name], place / name) for name in ("prompt", key))
    if prompt[-1]["role"] == "assistant":
        expected = "a message of the user or of a tool: an answer begins with its own turn"
        raise error_at(place / "prompt" / (len(prompt) - 1) / "role", "'assistant'", expected)
    for index, message in enumerate(answer):
        roles = ("assistant", "tool") if index else ("assistant",)
        if message["role"] not in roles:
            expected = f"{' or '.join(roles)}: the requests are in `prompt`, once for both sides"
            raise error_at(place / key / index / "role", repr(message["role"]), expected)
    for name, messages, weight, scored in (("prompt", prompt, 0, "not scored"), (key, answer, 1, "scored whole")):
        for index, message in enumerate(messages):
            if message.get("weight") not in (None, weight):
                expected = f"no weight: the answers of `{name}` are {scored}"
                raise error_at(place / name / index / "weight", repr(message["weight"]), expected)
    return Row((*unscored(prompt), *answer), place=row_place, side=side, **row_settings(data, place))


def _checked_messages(messages: Any, place: Place) -> Sequence[Mapping[str, Any]]:
    """Return the messages under a key of a record.

    Raises:
        RowError: If the list is empty, or a message is faulty.
    """
    if not messages:
        raise error_at(place, "is empty", "at least one message")
    for index, message in enumerate(messages):
        check_message(message, place / index)
    return list(messages)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
