"""What preference pairs and rated answers share: a prompt, and answers that stand apart from it.

A pair is `{"prompt": [messages], "chosen": [messages], "rejected": [messages]}`, and a rated answer is
`{"prompt": [messages], "completion": [messages], "label": true|false}`, each with the settings of a row. Each answer
becomes a row: the messages of the prompt, whose answers have weight 0, and those of the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from pytest_mistral_lora.chat.chunks.registry import measured
from pytest_mistral_lora.chat.fields import ROW_KEYS, check_message, error_at, refuse_keys, refuse_near_misses
from pytest_mistral_lora.chat.kinds.conversation import Conversation, row_settings
from pytest_mistral_lora.chat.remedies import import_command
from pytest_mistral_lora.chat.rows import Row, unscored, weight_of
from pytest_mistral_lora.places import Place

CHOSEN, REJECTED, WANTED, UNWANTED = "chosen", "rejected", "wanted", "unwanted"
SIDES = (CHOSEN, REJECTED, WANTED, UNWANTED)
"""The sides of a record: both answers of a pair, then a rated answer by its label."""

SETTINGS = tuple(key for key in ROW_KEYS if key != "messages")
"""The keys of a record that decide ids, beside its messages."""

FEWEST_ANSWERS = 10
"""Fewest answers of each side whose lengths are compared."""
_LONGER = 1.25
"""A side is longer if its mean and its median are these times the other side's."""
_TELLS = 0.8
"""The least share of pairs whose wanted answer is the longer one, if its length tells it."""


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


def wanted_are_longer(wanted: AnswerLengths, unwanted: AnswerLengths, longer: int, pairs: int) -> bool:
    """Return whether the wanted answers are told by their lengths, so that a model learns to write more.

    Shorter ones are what many pairs teach: an answer without talk around it, or a refusal. So are a few long ones.

    Args:
        wanted: The lengths of the wanted answers.
        unwanted: Those of the others.
        longer: The number of pairs whose wanted answer is the longer one.
        pairs: The number of pairs; 0 for rated answers.
    """
    if min(wanted.answers, unwanted.answers) < FEWEST_ANSWERS or longer < _TELLS * pairs:
        return False
    return wanted.mean >= _LONGER * unwanted.mean and wanted.median >= _LONGER * unwanted.median


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


class Preference(Conversation):
    """A record whose prompt stands apart from its answers, at most one of which the model should give.

    Attributes:
        loss: The kind of loss by which `import` makes conversations of its records.
        trainers: The class of the trainers of such records.
    """

    is_trained = False
    loss: ClassVar[str]
    trainers: ClassVar[str]

    def claims_prompt(self, record: Mapping[str, Any]) -> bool:
        """Return False: what a model continues is a conversation."""
        return False

    def wanted_part(self, row: Row) -> Row:
        """Return a row, or its prompt alone if its answer is not wanted."""
        return row if self.counts_as_wanted(row) else prompt_of(row)

    def answer_part(self, row: Row) -> Row:
        """Return a row without its prompt."""
        return answer_of(row)

    def record(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the record of the rows of its answers."""
        prompt = prompt_of(rows[0]).messages
        record: dict[str, Any] = {
            "prompt": [{key: value for key, value in message.items() if key != "weight"} for message in prompt]
        }
        for row in rows:
            record |= self.answer_json(row)
        return record | {key: value for key, value in self.to_json(rows[0]).items() if key != "messages"}

    def answer_json(self, row: Row) -> dict[str, Any]:
        """Return the fields of a record that hold the answer of a row."""
        return {self.answer_key(row): [dict(message) for message in answer_of(row).messages]}

    def otherwise(self, place: Place) -> str:
        """Return how to train on its wanted answers, and on both."""
        return (
            f"To train on the answers that are wanted: {import_command(place, '--lossy', self.loss)}, or `lossy: "
            f"[{self.loss}]` of the source in the recipe. To train on both: a {self.trainers}, with "
            "pytest_mistral_lora.guard(trainer)."
        )

    def row_of(self, data: Mapping[str, Any], key: str, side: str, place: Place, row_place: Place) -> Row:
        """Check the prompt of a record and the answer under a key, and return their row.

        Args:
            data: The record.
            key: The key of the answer.
            side: The side.
            place: The place of the record.
            row_place: The place of the row.

        Raises:
            RowError: With the field and the value, if it is faulty.
        """
        messages = _messages_of(data, key, place)
        return Row(messages, place=row_place, side=side, kind=self, **row_settings(data, place))


def _messages_of(data: Mapping[str, Any], key: str, place: Place) -> tuple[Mapping[str, Any], ...]:
    """Return the messages of the prompt, whose answers are not scored, and those of the answer under a key."""
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
    return (*unscored(prompt), *answer)


def _checked_messages(messages: Any, place: Place) -> Sequence[Mapping[str, Any]]:
    """Return the messages under a key of a record.

    Raises:
        RowError: If the list is empty, or a message is faulty.
    """
    if not messages:
        raise error_at(place, "is empty", "at least one message")
    for index, message in enumerate(messages):
        check_message(message, place / index)
    return [measured(message, place / index) for index, message in enumerate(messages)]


def is_list(value: Any) -> bool:
    """Return whether a value of a record is a list."""
    return isinstance(value, Sequence) and not isinstance(value, str)
