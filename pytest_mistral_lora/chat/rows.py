"""Chat rows: one conversation each, checked field by field before anything is encoded.

A row is `{"messages": [{"role": …, "content": …}, …], "tools": […], "reasoning_effort": …, "response_format": …}`; all
but the messages may be absent. Other keys of a row are the user's own; unknown keys of a *message* are refused, since a
misspelt `weight` or `tool_calls` would train on something else.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_mistral_lora.chat.fields import (
    IN_ORDER,
    check_message,
    check_response_format,
    check_text,
    check_tools,
    is_plain,
    kind_of,
    refuse_keys,
    refuse_near_misses,
)
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.places import NOWHERE, Place, file_of

if TYPE_CHECKING:
    from pytest_mistral_lora.chat.oracle.versions import VersionFacts


@dataclass(frozen=True, slots=True)
class Row:
    """One conversation, already checked.

    Attributes:
        messages: The messages as plain JSON data, in order.
        tools: Function tools in the OpenAI layout, or None.
        place: The place of the row, for messages; `NOWHERE` for a row made in code.
        reasoning_effort: The model setting of that name, as in mistral-common's request (tokenizers from v15 on): how
            much the answer is thought about, such as `none` or `high`. None for the tokenizer's own default.
        response_format: As in mistral-common's request; its schema is encoded by tokenizers whose
            `model_settings_builder` has a `json_schema`. None for plain text.
        side: The row's part in its record: a name of `chat.pairs.SIDES`, or empty for a conversation.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None
    place: Place = field(default=NOWHERE, compare=False)
    reasoning_effort: str | None = None
    response_format: Mapping[str, Any] | None = None
    side: str = field(default="", compare=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Row:
        """Check a row of plain data: the inverse of `to_json`.

        Args:
            data: A row as a line of a dataset has it: `{"messages": [...], "tools": [...]}`.

        Raises:
            RowError: With the field and the value, if the data is not a row.

        Example:
            >>> from pytest_mistral_lora import Row
            >>> Row.from_dict({"messages": [{"role": "user", "content": "Hi"}, {"role": "poet", "content": "Yo"}]})
            Traceback (most recent call last):
            pytest_mistral_lora.errors.RowError: messages[1].role: 'poet'; expected one of system, user, assistant, tool
        """
        return parse_row(data)

    def __eq__(self, other: object) -> bool:
        """Return whether two rows are encoded alike: the order of keys matters where mistral-common keeps it."""
        return self.canonical() == other.canonical() if isinstance(other, Row) else NotImplemented

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON data, fit for one line of a dataset."""
        data: dict[str, Any] = {"messages": [dict(message) for message in self.messages]}
        if self.tools:
            data["tools"] = [dict(tool) for tool in self.tools]
        if self.reasoning_effort is not None:
            data["reasoning_effort"] = self.reasoning_effort
        if self.response_format is not None:
            data["response_format"] = dict(self.response_format)
        return data

    def prompt_json(self) -> dict[str, Any]:
        """Return what the last answer follows, as plain JSON data."""
        return replace(self, messages=self.messages[: self.assistant_groups()[-1][0]]).to_json()

    def to_jsonl(self) -> str:
        """Return the row as one line that can be pasted into a dataset."""
        return json.dumps(self.to_json(), ensure_ascii=False)

    def canonical(self) -> str:
        """Return the row as canonical JSON: keys sorted, except where mistral-common keeps their order."""
        return compact_json(sorted_keys(self.to_json()))

    def content_field(self, index: int) -> str:
        """Return the field that holds the text of a message, for places: `messages[1].content`."""
        return f"messages[{index}].content"

    def assistant_groups(self) -> list[list[int]]:
        """Group the indices of the assistant messages that become one encoded turn.

        Consecutive assistant messages of equal weight are one turn, as in mistral-common's normaliser.
        """
        groups: list[list[int]] = []
        for index, message in enumerate(self.messages):
            if message["role"] != "assistant":
                continue
            joins = groups and groups[-1][-1] == index - 1 and weight_of(self.messages[index - 1]) == weight_of(message)
            if joins:
                groups[-1].append(index)
            else:
                groups.append([index])
        return groups


def compact_json(value: Any) -> str:
    """Return JSON on one line without spaces, its keys in the order given."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sorted_keys(value: Any, name: str = "") -> Any:
    """Return plain JSON data of a row with its keys sorted, except those under `IN_ORDER`."""
    if name in IN_ORDER:
        return value
    if isinstance(value, Mapping):
        return {key: sorted_keys(value[key], key) for key in sorted(value)}
    return [sorted_keys(item) for item in value] if isinstance(value, list | tuple) else value


def weight_of(message: Mapping[str, Any]) -> int:
    """Return 1 if an assistant message is trained on, else 0 (mistral-finetune's `weight`; 1 by default)."""
    weight = message.get("weight")
    return 1 if weight is None else int(weight)


def unscored(messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the messages of a prompt, with the weight 0 on each answer: only the answer behind them is scored."""
    return [{**message, "weight": 0} if message.get("role") == "assistant" else message for message in messages]


def text_of(content: Any) -> str:
    """Return the text of a checked `content`: a string, or text chunks joined as mistral-common joins them up to v13.

    Thinking chunks are left out; null is the empty text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "\n\n".join(chunk["text"] for chunk in content if chunk.get("text"))


def has_thinking(content: Any) -> bool:
    """Return whether a checked `content` has a chunk of type `thinking`."""
    return not isinstance(content, str | None) and any(chunk["type"] == "thinking" for chunk in content)


def merged_chunks(contents: Iterable[Any], facts: VersionFacts) -> list[dict[str, Any]]:
    """Merge the contents of the messages of one turn into chunks, as mistral-common does.

    Neighbouring texts become one: with a blank line between messages, and the version's joint between the chunks of a
    message.

    Args:
        contents: The checked `content` of each message of the turn, in order.
        facts: The facts of the tokenizer version.
    """
    chunks: list[dict[str, Any]] = []
    for content in contents:
        join = "\n\n"
        for chunk in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            if chunk["type"] == "thinking":
                chunks.append(dict(chunk))
            elif chunk["text"]:
                before = chunks.pop()["text"] + join if chunks and chunks[-1]["type"] == "text" else ""
                chunks.append({"type": "text", "text": before + chunk["text"]})
                join = facts.joint
    return chunks


def assistant_text(contents: Iterable[Any], facts: VersionFacts) -> str:
    """Return the text of one assistant turn, thinking included, as mistral-common encodes it.

    Most versions strip spaces at the end, unless the turn has thinking.

    Args:
        contents: The checked `content` of each message of the turn, in order.
        facts: The facts of the tokenizer version.
    """
    chunks = merged_chunks(contents, facts)
    text = "".join(chunk[chunk["type"]] for chunk in chunks)
    return text.rstrip(" ") if facts.strips_answers and not has_thinking(chunks) else text


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
    for index, message in enumerate(messages):
        # most messages are plain, and a dataset has millions: the place of a field is made for the others alone
        if not is_plain(message):
            check_message(message, place.within("messages", index))
    if not any(message["role"] == "assistant" for message in messages):
        raise RowError("no assistant message", place=place / "messages", expected="a turn that can be trained on")
    return Row(tuple(messages), place=place, **row_settings(data, place))


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
