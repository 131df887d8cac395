"""Convert one record of a known format to a row, and name each change and loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pytest_mistral_lora.chat.fields import Place, kind_of, refuse_near_misses
from pytest_mistral_lora.chat.foreign_fields import MEDIA
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.containers import Record
from pytest_mistral_lora.formats.drafts import Draft, RecordReading
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.recognition import FORMATS, recognise
from pytest_mistral_lora.formats.report import Change, changed, lost
from pytest_mistral_lora.formats.row_format import Recognised
from pytest_mistral_lora.formats.tool_calls import ToolCalls, convert_tools, has_padding

_COLUMNS = {
    # the last two: Gemini's API, as its SDKs and its REST interface spell it
    "system": ("system", "system_prompt", "system_instruction", "systemInstruction"),
    "tools": ("tools", "functions", "available_tools"),
}
_MARKS = ("label", "kto_tag")
_BAD_ANSWERS: Mapping[str, Callable[[Any], bool]] = {
    "reward": lambda value: _is_number(value) and value <= 0,
    "advantage": lambda value: _is_number(value) and value < 0,
    "is_correct": lambda value: _flag(value) is False,
    "rating": lambda value: value in ("bad", "thumbs_down", "negative"),
}
"""Keys of rollouts and ratings beside an answer, each with what shows that the answer was a bad one."""
_REJECTED = frozenset(("rejected_response", "rejected_messages"))
"""Keys of ms-swift for the worse answer, beside messages that end with the better one."""


def convert_record(record: Record, layout: Layout, *, padded: bool) -> tuple[dict[str, Any] | None, list[Change]]:
    """Return the row of a record as plain data, or None for a record whose answer is marked as bad, and the changes.

    Args:
        record: The record.
        layout: Its layout; `format` is known.
        padded: Whether absent keys are null, as in a table of Arrow.

    Raises:
        RowError: With the field and the value, if the record has another format or cannot be converted.
    """
    value, keys = _fields(record, layout)
    fields = {key: item for key, item in value.items() if item is not None}
    changes = [changed("null-keys")] if len(fields) < len(value) else []
    messages = fields.get(keys["messages"]) if "messages" in keys else None
    # a table pads its columns, but not the JSON text in them
    padded = (padded and not isinstance(messages, str)) or has_padding(messages)
    reading = RecordReading(record.place, layout, keys, padded)
    draft, more = FORMATS[layout.format].convert(Draft([], fields, ToolCalls(padded=padded)), reading)
    changes += more
    mark = _bad_mark(draft.fields, reading)
    if mark:
        return None, [*changes, lost("unwanted", mark)]
    fields, more = _without_media(draft.fields, keys)
    changes += more
    messages, fields, more = _with_system(draft.messages, fields, reading)
    changes += more
    messages, fields, more = _with_only_last(messages, fields)
    changes += more
    messages, more = _up_to_last_answer(messages, record.place)
    changes += more
    if "functions" in fields:
        changes.append(changed("function-call"))
    tools, fields, more = _column(fields, "tools", "keys", layout)
    changes += more
    tools, more = convert_tools(tools, Place(record.place, "tools"), padded=padded)
    changes += more
    user_fields, more = _own_keys(fields)
    return {"messages": messages, **({"tools": tools} if tools else {}), **user_fields}, changes + more


def _fields(record: Record, layout: Layout) -> tuple[Mapping[str, Any], dict[str, str]]:
    """Return the fields of a record, and its keys by the field of `RECORD_FIELDS`.

    Raises:
        RowError: If the record has another format.
    """
    value, expected = record.value, FORMATS[layout.format]
    recognised = recognise(value)
    if not isinstance(value, Mapping):
        if recognised is None:
            raise RowError(f"a record is {kind_of(value)}", place=record.place, expected="an object")
        # a bare list of messages
        value = {"messages": value}
        recognised = Recognised("messages", f"{FORMATS['messages'].title} ()", "", {"messages": "messages"})
    if recognised is not None and recognised.name != layout.format and not layout.keys:
        raise RowError(
            f"this is {recognised.title}",
            place=record.place,
            expected=f"{expected.title}, as you declared or as the file's first rows are",
        )
    keys = expected.keys
    if recognised is not None and recognised.name == layout.format:
        keys = recognised.keys
    # a declaration without a field has an empty key, and so has the column of pandas' index
    return value, {name: key for name, key in {**keys, **layout.keys}.items() if key}


def _bad_mark(fields: Mapping[str, Any], reading: RecordReading) -> str:
    """Return the key that marks the answer of a record as bad; empty if no key does."""
    declared = reading.keys.get("mark", "")
    for key in fields:
        if not key or key not in (declared, *_MARKS):
            continue
        flag = _flag(fields[key])
        if flag is None and key == declared:
            raise Place(reading.place, key).error(repr(fields[key]), "true or false")
        # 0 may be a user's class, but beside a prompt and its completion it is KTO's mark
        is_word = str(fields[key]).lower() == "false"
        if flag is False and (is_word or key == declared or reading.layout.format == "prompt-completion"):
            return key
    return next((key for key, is_bad in _BAD_ANSWERS.items() if key in fields and is_bad(fields[key])), "")


def _without_media(fields: Mapping[str, Any], keys: Mapping[str, str]) -> tuple[dict[str, Any], list[Change]]:
    """Return the fields without media and rejected answers."""
    media = {*MEDIA} | {keys[name] for name in MEDIA if name in keys}
    rest, changes = dict(fields), []
    for kind, left_out in (("media", media), ("rejected", _REJECTED)):
        for key in [key for key in rest if key in left_out]:
            if rest.pop(key) not in ("", []):
                changes.append(lost(kind, key))
    return rest, changes


def _with_system(
    messages: list[dict[str, Any]], fields: Mapping[str, Any], reading: RecordReading
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Change]]:
    """Return the messages behind the system prompt in a column of the record, or declared by the layout."""
    layout = reading.layout
    text, rest, changes = _column(fields, "system", "system", layout)
    text = text or layout.system
    text = _text_of_parts(text)
    if not isinstance(text, str):
        raise Place(reading.place, "system").error(f"is {kind_of(text)}", "a string")
    if not text or layout.drop_system:
        return messages, rest, changes
    if messages and messages[0]["role"] == "system":
        if messages[0].get("content") != text:
            changes.append(lost("system"))
        return messages, rest, changes
    return [{"role": "system", "content": text}, *messages], rest, [*changes, changed("system")]


def _column(
    fields: Mapping[str, Any], name: str, kind: str, layout: Layout
) -> tuple[Any, dict[str, Any], list[Change]]:
    """Return a column of a record, the other fields, and the changes.

    Args:
        fields: The fields of the record.
        name: A key of `_COLUMNS`.
        kind: The kind of loss for another column of the same meaning.
        layout: The layout of the record.
    """
    keys = (layout.keys[name],) if name in layout.keys else _COLUMNS[name]
    values = {key: fields[key] for key in keys if key and key in fields and fields[key] not in ("", [])}
    first = next(iter(values.values()), None)
    rest = {key: value for key, value in fields.items() if not key or key not in keys}
    return first, rest, [lost(kind, key) for key, value in values.items() if value != first]


def _with_only_last(
    messages: list[dict[str, Any]], fields: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Change]]:
    """Return the messages with weight 0 for all answers but the last, if `only_last` is set."""
    only_last = _flag(fields.get("only_last"))
    rest = dict(fields)
    if only_last is not None:
        del rest["only_last"]
    if not only_last:
        return messages, rest, []
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    weighed = [
        {**message, "weight": 0} if message["role"] == "assistant" and index < last else message
        for index, message in enumerate(messages)
    ]
    return weighed, rest, [changed("only-last")]


def _up_to_last_answer(messages: list[dict[str, Any]], place: str) -> tuple[list[dict[str, Any]], list[Change]]:
    """Return the messages up to the last answer.

    Raises:
        RowError: If no question comes before the answers, or an answer is empty.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if answers and len(answers) == len(messages):
        raise Place(place, "messages").error("answers without a question", "a user or system message before")
    for index in answers:
        content = messages[index].get("content")
        if isinstance(content, str) and not content.strip(" ") and "tool_calls" not in messages[index]:
            found, expected = "an empty answer", "a text: no tokenizer of Mistral's encodes an answer without one"
            raise Place(place, f"messages[{index}].content").error(found, expected)
    if answers and answers[-1] < len(messages) - 1:
        return messages[: answers[-1] + 1], [lost("last-prompt")]
    return messages, []


def _own_keys(fields: Mapping[str, Any]) -> tuple[dict[str, Any], list[Change]]:
    """Return the user's own keys, which change no token, except those that a row cannot have."""
    kept, changes = {}, []
    for key, value in fields.items():
        try:
            refuse_near_misses({key: value}, "")
            json.dumps(value, allow_nan=False)
        except (RowError, TypeError, ValueError):
            changes.append(lost("keys", str(key)))
            continue
        if key in ("messages", "tools"):
            changes.append(lost("keys", key))
        else:
            kept[key] = value
    return kept, changes


def _text_of_parts(value: Any) -> Any:
    """Return the text of a content as Gemini's API has it, if its parts are texts alone; any other value unchanged."""
    parts = value.get("parts") if isinstance(value, Mapping) else None
    texts = [part["text"] for part in parts or () if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "".join(texts) if isinstance(parts, list) and len(texts) == len(parts) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flag(value: Any) -> bool | None:
    """Return the truth of a field, which a column of CSV holds as text; None if it is not a truth value."""
    if isinstance(value, str):
        value = {"true": True, "false": False, "1": True, "0": False}.get(value.lower())
    return bool(value) if value in (True, False) else None
