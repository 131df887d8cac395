"""Make the messages of a row from the parts of a record: a prompt, an answer, a conversation.

A part is taken from the fields of the draft, converted, and put behind the messages that the draft has.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.fields import error_at, kind_of
from pytest_mistral_lora.formats.conversation import convert_messages, find_conversation
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.report import Change, changed, lost
from pytest_mistral_lora.formats.tool_calls import ToolCalls, from_json
from pytest_mistral_lora.places import Place


@dataclass(frozen=True, slots=True)
class RecordReading:
    """How a record is read.

    Attributes:
        place: The place of the record.
        layout: Its layout, with a format.
        keys: Its keys, by the field of `RECORD_FIELDS`.
        padded: Whether its absent keys are null, as in a table of Arrow.
        lossy: Kinds of `LOSSES` that are allowed.
    """

    place: Place
    layout: Layout
    keys: Mapping[str, str]
    padded: bool
    lossy: Collection[str] = ()


class Draft(NamedTuple):
    """A row during its conversion.

    Attributes:
        messages: The messages so far.
        fields: The fields of the record that are not converted yet, without null.
        calls: The tool calls of the row so far.
        answer_at: Index of the first message of the answer; None if its record does not tell.
        rejected: Of a pair, the messages with the worse answer; None for a record with one answer.
        texts: The fields of a row that is not a conversation, by their keys.
    """

    messages: list[dict[str, Any]]
    fields: Mapping[str, Any]
    calls: ToolCalls
    answer_at: int | None = None
    rejected: list[dict[str, Any]] | None = None
    texts: Mapping[str, Any] = MappingProxyType({})


def take(draft: Draft, name: str, reading: RecordReading) -> tuple[Any, Draft]:
    """Return the value of a field, None if the record does not have it, and the draft without the field."""
    key = reading.keys.get(name)
    if key is None or key not in draft.fields:
        return None, draft
    fields = dict(draft.fields)
    value = fields.pop(key)
    return value, draft._replace(fields=fields)


def take_joined(draft: Draft, first: str, reading: RecordReading) -> tuple[str, Draft, list[Change]]:
    """Return an instruction and its input as one text.

    Args:
        draft: The draft.
        first: The field of the instruction.
        reading: How the record is read.

    Raises:
        RowError: If one of the two is not a text, or both are missing.
    """
    layout = reading.layout
    is_present = reading.keys.get(first) in draft.fields
    texts = {}
    for name in (first, "input"):
        texts[name], draft = take(draft, name, reading)
    for name, text in texts.items():
        if not isinstance(text, str | None):
            raise error_at(reading.place / reading.keys[name], f"is {kind_of(text)}", "a string")
    instruction, given = texts[first] or "", texts["input"] or ""
    if not (instruction or given or is_present):
        # the record lacks the declared key: training would use an empty question
        raise error_at(reading.place / reading.keys.get(first, first), "is missing", "a text")
    if layout.templates is not None and (instruction + given).strip():
        # not str.format: a declaration must not access the attributes of an object
        template = layout.templates[0 if given else 1]
        text = template.replace("{instruction}", instruction).replace("{input}", given)
        return text, draft, [changed("input", "the declared format")]
    changes = [changed("input", "two lines")] if instruction and given else []
    return "\n".join(filter(None, (instruction, given))), draft, changes


def add_history(draft: Draft, reading: RecordReading, *, weight: int | None = None) -> tuple[Draft, list[Change]]:
    """Return the draft with the rounds of `history`, each a question and its answer, and the changes.

    Args:
        draft: The draft.
        reading: How the record is read.
        weight: As for `convert_messages`.

    Raises:
        RowError: If it is no list of pairs.
    """
    changes: list[Change] = []
    history, draft = take(draft, "history", reading)
    history = from_json(history, changes, reading.place / "history")
    if not isinstance(history, Sequence | None) or isinstance(history, str):
        raise error_at(reading.place / "history", f"is {kind_of(history)}", "a list of pairs")
    for index, pair in enumerate(history or ()):
        key = f"history[{index}]"
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise error_at(reading.place / key, repr(pair), "a pair: a prompt and its answer")
        changes.append(changed("history"))
        for value, role in zip(pair, ("user", "assistant"), strict=True):
            draft, more = add_side(draft, key, value, role, reading, weight=weight)
            changes += more
    return draft, changes


def add_conversation(draft: Draft, reading: RecordReading) -> tuple[Draft, list[Change]]:
    """Return the draft with the messages under the record's key, and the changes.

    Raises:
        RowError: If the key is missing, or a message cannot be converted.
    """
    key = reading.keys.get("messages", "messages")
    if key not in draft.fields:
        raise error_at(reading.place / key, "is missing", "a list of messages")
    fields = dict(draft.fields)
    return _with_messages(draft._replace(fields=fields), fields.pop(key), key, reading)


def add_side(
    draft: Draft, key: str, value: Any, role: str, reading: RecordReading, *, weight: int | None = None
) -> tuple[Draft, list[Change]]:
    """Return the draft with a prompt or an answer: a text, a message, a list of messages, or a request with messages.

    Args:
        draft: The draft.
        key: The key of the prompt or answer in the record.
        value: The prompt or answer.
        role: The role of a text.
        reading: How the record is read.
        weight: As for `convert_messages`.

    Raises:
        RowError: If the value is missing or empty, or a message cannot be converted.
    """
    changes: list[Change] = []
    if isinstance(value, str) and value.lstrip().startswith("[{") and find_conversation({"messages": value}):
        value = from_json(value, changes, reading.place / key)
    if isinstance(value, Mapping) and "messages" in value:
        settings = {name: setting for name, setting in value.items() if name != "messages"}
        changes += [
            lost("keys", f"{key}.{name}")
            for name in settings
            if name in draft.fields and settings[name] != draft.fields[name]
        ]
        draft = draft._replace(fields={**settings, **draft.fields})
        value = value["messages"]
    # trainers accept an empty question silently, and train on an answer to nothing
    is_empty = value == [] or (role == "user" and isinstance(value, str) and not value.strip())
    if value is None or is_empty:
        raise error_at(reading.place / key, "is missing" if value is None else "is empty", "a text or messages")
    if isinstance(value, str):
        value = [{"role": role, "content": value}]
    elif isinstance(value, Mapping):
        value = [value]
    draft, more = _with_messages(draft, value, key, reading, weight=weight)
    return draft, changes + more


def add_answer(draft: Draft, key: str, value: Any, reading: RecordReading) -> tuple[Draft, list[Change]]:
    """Return the draft with the answer to its prompt: a text, or a conversation that may include the prompt.

    In a conversation, the record does not tell where the answer begins.

    Raises:
        RowError: If the conversation begins with another question than the prompt, or with the prompt where the record
            is read as it is given: a trainer would train on it twice.
    """
    prompt = draft.messages
    draft, changes = add_side(draft, key, value, "assistant", reading)
    answer = draft.messages[len(prompt) :]
    roles = [message["role"] for message in answer if message["role"] != "system"]
    if not prompt and roles[:1] == ["assistant"]:
        expected = "`prompt`, or a chosen conversation"
        raise error_at(reading.place / key, "a chosen answer without its prompt", expected)
    answer_texts, prompt_texts = _texts(answer), _texts(prompt)
    # a text prompt is the first question, behind the conversation's own system prompt or greeting
    question = next((index for index, (role, _) in enumerate(answer_texts) if role == "user"), 0)
    for start in (0, question):
        if prompt and answer_texts[start : start + len(prompt)] == prompt_texts:
            if draft.calls.as_given:
                raise error_at(reading.place / key / start / "role", "is that of the prompt again", "the answer alone")
            return draft._replace(messages=[*answer[:start], *prompt, *answer[start + len(prompt) :]]), changes
    if prompt and prompt[-1]["role"] == "user" and roles[:1] == ["user"]:
        expected = "the answer alone, or the prompt and its answer"
        raise error_at(reading.place / key, "begins with another question than the prompt", expected)
    return draft._replace(answer_at=len(prompt) or None), changes


def add_pair(
    draft: Draft, chosen: tuple[str, Any], rejected: tuple[str, Any], reading: RecordReading
) -> tuple[Draft, list[Change]]:
    """Return the draft with both answers to its prompt.

    Args:
        draft: The draft with the prompt.
        chosen: The key and the value of the better answer.
        rejected: Those of the worse answer.
        reading: How the record is read.

    Raises:
        RowError: As for `add_answer`.
    """
    # the calls of one answer are not those of the other
    other = draft._replace(calls=copy.deepcopy(draft.calls))
    draft, changes = add_answer(draft, *chosen, reading)
    other, more = add_answer(other, *rejected, reading)
    answer_at = draft.answer_at if other.answer_at is None else other.answer_at
    return draft._replace(answer_at=answer_at, rejected=other.messages), changes + more


def _texts(messages: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    return [(message["role"], message.get("content")) for message in messages]


def _with_messages(
    draft: Draft, items: Any, key: str, reading: RecordReading, *, weight: int | None = None
) -> tuple[Draft, list[Change]]:
    place = reading.place / (key or "messages")
    messages, changes = convert_messages(
        items, place, reading.layout, draft.calls, padded=reading.padded, weight=weight
    )
    return draft._replace(messages=[*draft.messages, *messages]), changes
