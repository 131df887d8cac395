"""Convert one record of a known format to a row, and name each change and loss."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pytest_mistral_lora.chat.fields import check_tools, error_at, kind_of, refuse_near_misses, unchecked_medium
from pytest_mistral_lora.chat.foreign_fields import MEDIA, PICTURES
from pytest_mistral_lora.chat.kinds.records import shown_kind
from pytest_mistral_lora.chat.remedies import import_command
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.formats.answers_apart import after_prompt, pair_of, rated_of
from pytest_mistral_lora.formats.containers import Record
from pytest_mistral_lora.formats.declared_keys import Mark, MarkColumns, flag_of, mark_of, unwanted_key
from pytest_mistral_lora.formats.drafts import Draft, RecordReading, add_side
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.pictures import with_pictures
from pytest_mistral_lora.formats.recognition import FORMATS, recognise
from pytest_mistral_lora.formats.report import LOSSES, Change, changed, lost
from pytest_mistral_lora.formats.row_format import Recognised
from pytest_mistral_lora.formats.tool_calls import ToolCalls, convert_tools, has_padding
from pytest_mistral_lora.places import NOWHERE, Place

_COLUMNS = {
    # the last two: Gemini's API, as its SDKs and its REST interface spell it
    "system": ("system", "system_prompt", "system_instruction", "systemInstruction"),
    "tools": ("tools", "functions", "available_tools"),
}
_REJECTED = ("rejected_response", "rejected_messages")
"""Keys for the worse answer, beside messages that end with the better one."""


def convert_record(
    record: Record,
    layout: Layout,
    columns: MarkColumns,
    *,
    padded: bool,
    lossy: Collection[str] = (),
    as_given: bool = False,
) -> tuple[dict[str, Any] | None, list[Change]]:
    """Return the row of a record as plain data, or None for one whose answer is marked as bad or cut, and the changes.

    A record with a better and a worse answer is a pair, and one whose answer is marked as good or bad is a rated
    answer, unless the loss of the worse or the bad one is allowed.

    Args:
        record: The record.
        layout: Its layout; `format` is known.
        columns: The columns of its file that can mark answers.
        padded: Whether absent keys are null, as in a table of Arrow.
        lossy: Kinds of `LOSSES` that are allowed.
        as_given: As for `ToolCalls`.

    Raises:
        RowError: With the field and the value, if the record has another format or cannot be converted.
    """
    value, keys = _fields(record, layout)
    fields = {key: item for key, item in value.items() if item is not None}
    changes = [changed("null-keys")] if len(fields) < len(value) else []
    messages = fields.get(keys["messages"]) if "messages" in keys else None
    # a table pads its columns, but not the JSON text in them
    padded = not as_given and ((padded and not isinstance(messages, str)) or has_padding(messages))
    reading = RecordReading(record.place, layout, keys, padded, lossy)
    draft, more = FORMATS[layout.format].convert(
        Draft([], fields, ToolCalls(padded=padded, as_given=as_given)), reading
    )
    changes += more
    if draft.texts:
        return _row_of_texts(draft, reading, columns, changes)
    draft, more = _with_rejected(draft, reading)
    changes += more
    mark = None
    # what a record with both answers declares says nothing about one of them
    if draft.rejected is None:
        mark = _marked(draft.fields, columns, reading)
        if bad := _unwanted(draft.fields, mark, keeps_bad="unwanted" not in lossy):
            return None, [*changes, lost("unwanted", bad)]
    if "unwanted" in lossy:
        mark = None
    if mark is not None:
        if isinstance(letters := draft.fields[mark.key], str):
            changes.append(changed("label-letters", letters))
        draft = draft._replace(fields={key: item for key, item in draft.fields.items() if key != mark.key})
    messages, fields, more = with_pictures(draft.messages, draft.fields, reading)
    # both answers of a pair are given to one prompt, with its pictures
    rejected = None if draft.rejected is None else with_pictures(draft.rejected, draft.fields, reading)[0]
    draft = draft._replace(messages=messages, rejected=rejected, fields=fields)
    changes += more
    fields, more = _without_media(draft.fields, keys)
    changes += more
    answer_at = draft.answer_at
    messages, rest, more = _finished(draft.messages, fields, reading)
    changes += more
    if answer_at is not None and len(messages) > len(draft.messages):
        # behind the system prompt of the record
        answer_at += 1
    turns: dict[str, Any] = {"messages": messages}
    if draft.rejected is not None:
        rejected, _, _ = _finished(draft.rejected, fields, reading)
        turns, more = pair_of(messages, rejected, answer_at, record.place)
    elif mark is not None:
        turns, more = rated_of(messages, answer_at, mark.is_good, record.place)
        # those of a conversation, which it does not become
        changes = [change for change in changes if change.kind not in ("turns", "prompt-weights")]
    else:
        more = []
    changes += more
    # a record that is such a row already is not changed
    if "messages" not in turns and shown_kind(value) is None:
        changes.append(changed("pair") if mark is None else changed("rated", mark.key))
    if "functions" in rest:
        changes.append(changed("function-call"))
    tools, rest, more = _column(rest, "tools", "keys", layout)
    changes += more
    tools, more = convert_tools(tools, record.place / "tools", padded=padded)
    changes += more
    user_fields, more = _own_keys(rest, turns)
    return {**turns, **({"tools": tools} if tools else {}), **user_fields}, changes + more


def convert_as_given(
    data: Mapping[str, Any], keys: Sequence[str], place: Place
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a record of turns under our names of its roles and fields, and what was changed, in words.

    It is what `import` makes of the turns and tools of the record, but for ids of calls and letters in texts, which are
    in its tokens: those of other programs stay as they are. The user's own keys, such as a label, stay, too.

    Args:
        data: The record, which is not in our form.
        keys: The keys of its kind.
        place: Its place.

    Raises:
        RowError: With the field and the value, if it has another format, cannot be converted, or would lose something.
    """
    own = {key: data[key] for key in (*keys, "functions", *PICTURES) if key in data}
    found = recognise(own)
    if found is None or not (found.is_row or shown_kind(data)):
        raise RowError("a record of another format", place=place)
    if "tools" in own and "functions" not in own:
        with suppress(RowError):
            check_tools(own["tools"], place)
            # they are ours already
            del own["tools"]
    layout, columns = Layout(found.name), MarkColumns(lambda: (own,))
    converted, changes = convert_record(Record(place, own), layout, columns, padded=False, as_given=True)
    if not changes and "tools" in own:
        # they are in no form, and would be lost without a word
        raise RowError("a record of another format", place=place)
    for change in changes:
        if change.is_loss:
            lost_part = LOSSES[change.kind] + (f" ({change.detail})" if change.detail else "")
            if change.kind == "media":
                raise unchecked_medium(change.detail, f"a row with {lost_part}", change.place or place)
            step = f"To leave it out: {import_command(place, '--lossy', change.kind)}"
            raise RowError(f"a row cannot keep {lost_part}", place=change.place or place, next_step=step)
    rest = {key: value for key, value in data.items() if key not in own}
    words = dict.fromkeys(change.words for change in changes)
    return {**rest, **(converted or {})}, tuple(words) or ("fields have our names",)


def _row_of_texts(
    draft: Draft, reading: RecordReading, columns: MarkColumns, changes: list[Change]
) -> tuple[dict[str, Any] | None, list[Change]]:
    """Return a row that is not a conversation as plain data, or None if it is marked as bad, and the changes."""
    if bad := _unwanted(draft.fields, _marked(draft.fields, columns, reading), keeps_bad=False):
        return None, [*changes, lost("unwanted", bad)]
    own, more = _own_keys(draft.fields, draft.texts)
    return {**draft.texts, **own}, changes + more


def _marked(fields: Mapping[str, Any], columns: MarkColumns, reading: RecordReading) -> Mark | None:
    rates = reading.layout.format == "prompt-completion"
    return mark_of(fields, columns, reading.place, declared=reading.keys.get("mark", ""), rates=rates)


def _unwanted(fields: Mapping[str, Any], mark: Mark | None, *, keeps_bad: bool) -> str:
    """Return the key by which an answer is bad or cut; empty if none is, or if it is kept with its mark."""
    if mark is not None and not mark.is_good and not keeps_bad:
        return mark.key
    return unwanted_key({key: value for key, value in fields.items() if mark is None or key != mark.key})


def _finished(
    messages: list[dict[str, Any]], fields: Mapping[str, Any], reading: RecordReading
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Change]]:
    """Return the messages of a row with its system prompt, up to its last answer; the other fields; the changes.

    Raises:
        RowError: If no question comes before the answers, or an answer is empty.
    """
    messages, rest, changes = _with_system(messages, fields, reading)
    messages, rest, more = _with_only_last(messages, rest, reading)
    changes += more
    messages, more = _up_to_last_answer(messages, reading.place)
    return messages, rest, changes + more


def _with_rejected(draft: Draft, reading: RecordReading) -> tuple[Draft, list[Change]]:
    """Return the draft with the worse answer that stands beside the messages, unless its loss is allowed."""
    key = next((key for key in _REJECTED if draft.fields.get(key) not in (None, "", [])), "")
    if not key or "rejected" in reading.lossy or draft.rejected is not None:
        return draft, []
    fields = {name: item for name, item in draft.fields.items() if name not in _REJECTED}
    # a conversation has its prompt in it, and an answer follows the one of the messages
    is_whole = key == "rejected_messages" and _begins_with_a_prompt(draft.fields[key], reading)
    answer_at = after_prompt(draft.messages)
    prompt = Draft([], fields, ToolCalls(padded=reading.padded))
    if not is_whole:
        prompt = Draft(draft.messages[:answer_at], fields, copy.deepcopy(draft.calls))
    other, changes = add_side(prompt, key, draft.fields[key], "assistant", reading)
    answer = None if is_whole else answer_at
    return draft._replace(fields=fields, answer_at=answer, rejected=other.messages), changes


def _begins_with_a_prompt(messages: Any, reading: RecordReading) -> bool:
    first = messages[0] if isinstance(messages, list) else None
    role = first.get("role") or first.get("from") if isinstance(first, Mapping) else None
    return role is not None and reading.layout.role(role) != "assistant"


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
        raise error_at(reading.place / "system", f"is {kind_of(text)}", "a string")
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
    messages: list[dict[str, Any]], fields: Mapping[str, Any], reading: RecordReading
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Change]]:
    """Return the messages with weight 0 for all answers but the last, if mistral-finetune trains on that one alone.

    It does so for a row with `only_last`, and for each row with tools (`finetune/data/tokenize.py`). The tools of a row
    of another program say nothing of training: the row has to have a key that mistral-finetune alone reads.
    """
    only_last = flag_of(fields.get("only_last"))
    rest = dict(fields)
    if only_last is not None:
        del rest["only_last"]
    is_of_finetune = only_last is not None or reading.keys.get("messages") == "interactions"
    listed = ("available_tools", "tools") if is_of_finetune else ("available_tools",)
    has_tools = any(fields.get(key) not in (None, "", [], "[]") for key in listed)
    if not only_last and not has_tools:
        return messages, rest, []
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    weighed = [
        {**message, "weight": 0} if message["role"] == "assistant" and index < last else message
        for index, message in enumerate(messages)
    ]
    return weighed, rest, [changed("only-last" if only_last else "tools-last")]


def _up_to_last_answer(messages: list[dict[str, Any]], place: Place) -> tuple[list[dict[str, Any]], list[Change]]:
    """Return the messages up to the last answer.

    Raises:
        RowError: If no question comes before the answers, or an answer is empty.
    """
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if answers and len(answers) == len(messages):
        raise error_at(place / "messages", "answers without a question", "a user or system message before")
    for index in answers:
        content = messages[index].get("content")
        if isinstance(content, str) and not content.strip(" ") and "tool_calls" not in messages[index]:
            found, expected = "an empty answer", "a text: no tokenizer of Mistral's encodes an answer without one"
            raise error_at(place / "messages" / index / "content", found, expected)
    if answers and answers[-1] < len(messages) - 1:
        return messages[: answers[-1] + 1], [lost("last-prompt", place=place / "messages" / (answers[-1] + 1))]
    return messages, []


def _own_keys(fields: Mapping[str, Any], turns: Mapping[str, Any]) -> tuple[dict[str, Any], list[Change]]:
    """Return the user's own keys, which change no token, except those that a row with these turns cannot have."""
    kept, changes = {}, []
    for key, value in fields.items():
        try:
            refuse_near_misses({key: value}, NOWHERE)
            json.dumps(value, allow_nan=False)
        except (RowError, TypeError, ValueError):
            changes.append(lost("keys", str(key)))
            continue
        if key in ("messages", "tools", *turns):
            changes.append(lost("keys", key))
        else:
            kept[key] = value
    return kept, changes


def _text_of_parts(value: Any) -> Any:
    """Return the text of a content as Gemini's API has it, if its parts are texts alone; any other value unchanged."""
    parts = value.get("parts") if isinstance(value, Mapping) else None
    texts = [part["text"] for part in parts or () if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
    return "".join(texts) if isinstance(parts, list) and len(texts) == len(parts) else value
