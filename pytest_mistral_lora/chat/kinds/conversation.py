"""Conversations: `{"messages": [...]}`, with the settings of a row. What no other kind claims is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pytest_mistral_lora.chat.chunks.registry import measured
from pytest_mistral_lora.chat.fields import (
    ROW_KEYS,
    check_message,
    check_response_format,
    check_text,
    check_tools,
    is_plain,
    kind_of,
    refuse_keys,
    refuse_near_misses,
)
from pytest_mistral_lora.chat.rows import Message, RecordKind, Row, weight_of
from pytest_mistral_lora.chat.turns import Tokenization, Turn
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import NOWHERE, Place, file_of


class Conversation(RecordKind):
    """A conversation: each answer of weight 1 is trained on."""

    name = "conversation"
    title = row_title = "a conversation"
    importable = f"{__name__}:CONVERSATION"
    keys: ClassVar[tuple[str, ...]] = ROW_KEYS
    order = 0
    is_chat = True
    is_prose = True
    placeholder: ClassVar[Message] = {"role": "assistant", "content": "."}
    text_law = "pytest_mistral_lora.conformance.mask.row_laws:assistant_text_violation"
    text_rule = "ML109"
    conversion = "pytest_mistral_lora.formats.converter:convert_as_given"

    def claims(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record has messages."""
        return "messages" in record

    def parse(self, data: Any, place: Place = NOWHERE) -> tuple[Row, ...]:
        """Check a conversation, and return its row.

        Raises:
            RowError: With the field and the value, if it is faulty.
        """
        return (parse_row(data, place=place),)

    def claims_prompt(self, record: Mapping[str, Any]) -> bool:
        """Return whether the messages of a record end with a question or with the result of a tool."""
        messages = record.get("messages")
        last = messages[-1] if isinstance(messages, Sequence) and messages else None
        return isinstance(last, Mapping) and last.get("role") in ("user", "tool")

    def answered(self, prompt: Mapping[str, Any], answer: Sequence[Message], place: Place = NOWHERE) -> Row:
        """Return the row of the messages with those of the answer behind them.

        Raises:
            RowError: With the field and the value, if the row is faulty.
        """
        messages = prompt.get("messages")
        # the check of a row names the fault of any other value
        whole = [*messages, *answer] if isinstance(messages, list | tuple) else messages
        return parse_row({**prompt, "messages": whole}, place=place)

    def to_json(self, row: Row) -> dict[str, Any]:
        """Return the messages and the settings of a row."""
        data: dict[str, Any] = {"messages": [dict(message) for message in row.messages]}
        if row.tools:
            data["tools"] = [dict(tool) for tool in row.tools]
        if row.reasoning_effort is not None:
            data["reasoning_effort"] = row.reasoning_effort
        if row.response_format is not None:
            data["response_format"] = dict(row.response_format)
        return data

    def prompt_json(self, row: Row) -> dict[str, Any]:
        """Return the row without its last answer."""
        return self.to_json(replace(row, messages=row.messages[: self.answer_groups(row)[-1][0]]))

    def answer_groups(self, row: Row) -> list[list[int]]:
        """Group the indices of the assistant messages that become one encoded turn.

        Consecutive assistant messages of equal weight are one turn, as in mistral-common's normaliser.
        """
        groups: list[list[int]] = []
        for index, message in enumerate(row.messages):
            if message["role"] != "assistant":
                continue
            joins = groups and groups[-1][-1] == index - 1 and weight_of(row.messages[index - 1]) == weight_of(message)
            if joins:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups

    def content_part(self, row: Row, index: int) -> tuple[str | int, ...]:
        """Return the path to the content of a message: `messages[1].content`."""
        return "messages", index, "content"

    def turns(self, oracle: Tokenization, row: Row) -> list[Turn]:
        """Return the turns of the messages, as mistral-common's finetuning validation takes them.

        Raises:
            OracleRejection: If mistral-common refuses the conversation, with its reason.
        """
        return oracle.chat_turns(row)

    def prompt_turns(self, oracle: Tokenization, row: Row) -> list[Turn]:
        """Return the turns of the messages before the last answer; of a row that ends without one, of all messages.

        Raises:
            OracleRejection: If nothing comes before the last answer, or mistral-common refuses it.
        """
        groups = row.assistant_groups()
        is_answered = bool(groups) and groups[-1][-1] == len(row.messages) - 1
        prompt = replace(row, messages=row.messages[: groups[-1][0]]) if is_answered else row
        return oracle.chat_turns(prompt, as_prompt=True)


CONVERSATION = Conversation()


def parse_row(data: Any, *, place: Place = NOWHERE) -> Row:
    """Check plain JSON data and return it as a `Row`.

    Raises:
        RowError: With the field and the value, if the data is not a row.
    """
    messages = data.get("messages") if isinstance(data, Mapping) else None
    first = messages[0] if isinstance(messages, Sequence) and messages else None
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str)
    if not is_list or (isinstance(first, Mapping) and "from" in first and "role" not in first):
        _refuse_another_format(data, place)
    if not isinstance(data, Mapping):
        raise RowError(f"a row is {kind_of(data)}", place=place, expected='an object with "messages"')
    refuse_near_misses(data, place)
    refuse_keys(data, place)
    if messages is None:
        raise RowError('no "messages"', place=place, expected='a list under "messages"')
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise RowError(f"messages is {kind_of(messages)}", place=place, expected="a list")
    if not messages:
        raise RowError("messages is empty", place=place, expected="at least one user and one assistant message")
    # most messages are plain, and a dataset has millions: the place of a field is made for the others alone
    others = [index for index, message in enumerate(messages) if not is_plain(message)]
    for index in others:
        check_message(messages[index], place.within("messages", index))
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant message", place=place / "messages", expected="a turn that can be trained on")
    whole = list(messages)
    for index in others:
        whole[index] = measured(messages[index], place.within("messages", index))
    return Row(tuple(whole), place=place, kind=CONVERSATION, **row_settings(data, place))


def row_settings(data: Mapping[str, Any], place: Place) -> dict[str, Any]:
    """Check the settings of a record, and return them as arguments of `Row`.

    Raises:
        RowError: With the field and the value, if one cannot be used.
    """
    tools, effort, response_format = (data.get(key) for key in ("tools", "reasoning_effort", "response_format"))
    if tools is not None:
        check_tools(tools, place / "tools")
    if effort is not None:
        check_text(effort, place / "reasoning_effort")
    if response_format is not None:
        check_response_format(response_format, place / "response_format")
    return {
        "tools": tuple(tools) if tools else None,
        "reasoning_effort": effort,
        "response_format": response_format,
    }


def _refuse_another_format(data: Any, place: Place) -> None:
    """Refuse a record of another format by the format's name.

    Raises:
        RowError: If the format is known.
    """
    # the only import of a higher room in `chat`: only the formats know how records of theirs look
    from pytest_mistral_lora.formats.recognition import recognise

    recognised = recognise(data)
    if recognised is not None:
        raise RowError(
            f"this is {recognised.title}",
            place=place,
            expected='an object with "messages" of role/content',
            next_step=recognised.next_step(file_of(place)),
        )
