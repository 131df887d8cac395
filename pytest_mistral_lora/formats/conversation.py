"""Recognise a list of messages of any layout, and convert roles, content, thinking and weights to a row's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.chunks.registry import chunk_types
from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.fields import ROLES, error_at, kind_of
from pytest_mistral_lora.chat.foreign_fields import CALL, CONTENT, FLAGS, MEDIA_PARTS, THOUGHTS
from pytest_mistral_lora.chat.reading import loads_strict
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.report import Change, changed, lost
from pytest_mistral_lora.formats.tool_calls import ToolCalls, from_json
from pytest_mistral_lora.places import Place

MESSAGE_LISTS = ("messages", "conversations", "conversation", "interactions", "contents")
"""Keys under which records have a list of messages."""

_TURN_KEYS = (
    ("from", "value"),
    ("role", "content"),
    ("role", "text"),
    ("role", "value"),
    ("role", "parts"),
    ("role", "tool_calls"),
)
_TOOL_USE = {"id": "id", "name": "name", "input": "arguments"}
"""Keys of a call in Anthropic's chunk `tool_use`, each with our name."""
# a call in the letters of Hermes and Qwen, and the same of a result
_CALL_IN_TEXT = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_RESULT_IN_TEXT = re.compile(r"\s*<tool_response>(.*)</tool_response>\s*", re.DOTALL)
_CALL_KEYS = ("tool_calls", "tool_call_id", "name")
_ORDER = ("role", "content", *_CALL_KEYS, "weight")


class FoundConversation(NamedTuple):
    """The list of messages in a record.

    Attributes:
        key: Its key.
        words: The key and the keys of its messages, in words.
        is_sharegpt: Whether its name or its form is that of ShareGPT.
    """

    key: str
    words: str
    is_sharegpt: bool


def find_conversation(record: Mapping[str, Any]) -> FoundConversation | None:
    """Return the first list of messages of a record, or None if it has none."""
    for key in MESSAGE_LISTS:
        items = record.get(key)
        if isinstance(items, str):
            try:
                # a column of CSV or Parquet holds text
                items = json.loads(items)
            except (ValueError, RecursionError):
                continue
        is_named = key.startswith("conversation")
        if items == []:
            return FoundConversation(key, f"`{key}`, which is empty", is_named)
        shown = message_keys(items)
        if shown:
            return FoundConversation(key, f"`{key}` with {shown}", is_named or shown == "from/value")
    return None


def message_keys(items: Any) -> str:
    """Return the keys of a list of messages, `from/value`; empty if it is not such a list."""
    if not isinstance(items, Sequence) or isinstance(items, str) or not items or not isinstance(items[0], Mapping):
        return ""
    first = items[0]
    # a message that calls tools may have no content
    return next((f"{role}/{content}" for role, content in _TURN_KEYS if role in first and content in first), "")


def convert_messages(
    items: Any, place: Place, layout: Layout, calls: ToolCalls, *, padded: bool, weight: int | None = None
) -> tuple[list[dict[str, Any]], list[Change]]:
    """Return the messages of a row for a list of messages, and the changes.

    Args:
        items: The list, or its JSON.
        place: Its place.
        layout: The layout of its record.
        calls: The tool calls of the row so far; those of the messages are added.
        padded: Whether absent keys are null, as in a table of Arrow.
        weight: The weight of answers without a flag; if it is 0, the most that a flag gives.

    Raises:
        RowError: If a message cannot be converted.
    """
    changes: list[Change] = []
    items = from_json(items, changes, place)
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise error_at(place, f"is {kind_of(items)}", "a list of messages")
    calls.reserve_ids(items)
    items, numbers, more = _with_results_apart(items)
    changes += more
    roles = []
    for index, item in zip(numbers, items, strict=True):
        role, more = _role_of(item, place / index, layout)
        roles.append(role)
        changes += more
    messages: list[dict[str, Any]] = []
    for position, (index, item, role) in enumerate(zip(numbers, items, roles, strict=True)):
        here = place / index
        if role == "system" and layout.drop_system:
            changes.append(changed("system-dropped"))
            continue
        message, rest, more = _convert_message(item, role, here, layout, calls, padded=padded)
        changes += more
        rest, more = _weigh(message, rest, here, layout, weight)
        changes += more
        answers = [message]
        if role == "tool":
            is_last_result = roles[position + 1 : position + 2] != ["tool"]
            answers, rest, more = _results(message, rest, here, calls, is_last=is_last_result)
            changes += more
        if rest:
            changes += _left_out(rest, here)
        messages += [{key: made[key] for key in _ORDER if key in made} for made in answers]
    return messages, changes


def _with_results_apart(items: Sequence[Any]) -> tuple[Sequence[Any], Sequence[int], list[Change]]:
    """Return the messages, the index of each, and the change: a user's chunks of tool results become messages.

    Anthropic's API has the results of tools in the user's message, before its text.
    """
    if not any(_result_chunks(item) for item in items):
        return items, range(len(items)), []
    apart: list[Any] = []
    numbers = []
    for index, item in enumerate(items):
        results = _result_chunks(item)
        messages: list[Any] = [_result_message(chunk) for chunk in results]
        rest = [chunk for chunk in item["content"] if chunk not in results] if results else []
        if rest or not results:
            messages.append({**item, "content": rest} if results else item)
        apart += messages
        numbers += [index] * len(messages)
    return apart, numbers, [changed("result-chunks")]


def _result_message(chunk: Mapping[str, Any]) -> dict[str, Any]:
    """Return the message of a result; keys of the chunk that a message does not have are a loss there."""
    rest = {key: value for key, value in chunk.items() if key not in ("type", "tool_use_id")}
    return {"role": "tool", "content": "", **rest, "tool_call_id": chunk.get("tool_use_id")}


def _result_chunks(item: Any) -> list[Mapping[str, Any]]:
    """Return the chunks of a message that are results of tools."""
    content = item.get("content") if isinstance(item, Mapping) else None
    chunks = content if isinstance(content, list | tuple) else ()
    return [chunk for chunk in chunks if isinstance(chunk, Mapping) and chunk.get("type") == "tool_result"]


def _role_of(item: Any, place: Place, layout: Layout) -> tuple[str, list[Change]]:
    if not isinstance(item, Mapping):
        raise error_at(place, f"is {kind_of(item)}", "a message: an object with a role and a content")
    key = layout.message_keys.get("role") or ("from" if item.get("role") is None else "role")
    given = item.get(key)
    role = layout.role(given)
    if role is None:
        found = repr(given) if given is not None else "is missing"
        anywhere = "`roles` in the `layout` of a recipe's source, or the roles in your trainer's configuration"
        step = f"Declare it: {layout.roles_in or anywhere}."
        names = ", ".join([*ROLES, *layout.roles, "human, gpt, observation, function_call"])
        raise error_at(place / key, found, f"one of {names}", step)
    for other in {"role", "from"} - {key}:
        if layout.role(item.get(other)) not in (None, role):
            raise error_at(place / other, f"{item[other]!r}, and `{key}` is {given!r}", "one role")
    return role, [changed("roles", f"{given} is {role}")] if role not in (given, CALL) else []


def _convert_message(
    item: Mapping[str, Any], role: str, place: Place, layout: Layout, calls: ToolCalls, *, padded: bool
) -> tuple[dict[str, Any], dict[str, Any], list[Change]]:
    """Return a message with its content, thinking and tool calls, the remaining keys, and the changes."""
    message: dict[str, Any] = {"role": "assistant" if role == CALL else role}
    rest, changes = _own_keys(item, layout)
    content, called, rest, more = _content(rest, message["role"], place, layout)
    changes += more
    if role == CALL:
        content, called = None, from_json(content, changes, place)
        if not called:
            raise error_at(place, "has no tool call", 'JSON of {"name": …, "arguments": …}')
    # a row as it is given may have such letters in a text
    reads_letters = not calls.as_given
    if reads_letters and role == "assistant" and called is None and isinstance(content, str):
        content, called = _calls_in_text(content)
        if called is not None:
            changes.append(changed("call-text"))
    if reads_letters and role == "tool" and isinstance(content, str) and (tagged := _RESULT_IN_TEXT.fullmatch(content)):
        content = tagged[1].strip()
        changes.append(changed("call-text"))
    if "function_call" in rest:
        called = from_json(rest.pop("function_call"), changes, place / "function_call")
        changes.append(changed("function-call"))
    native = from_json(rest.pop("tool_calls", None), changes, place / "tool_calls")
    if native or called is not None:
        calls.open = []
        message["tool_calls"] = []
        if native:
            message["tool_calls"] += calls.read(native, changes, place / "tool_calls")
        if called is not None:
            message["tool_calls"] += calls.read(called, changes, place)
    thoughts = _thoughts(rest, layout)
    if thoughts:
        rest = {key: value for key, value in rest.items() if key not in thoughts}
        changes.append(changed("thinking"))
        content = _with_thoughts(content, thoughts)
    if content is not None or ("content" in rest and not (padded and "tool_calls" in message)):
        message["content"] = content
    rest.pop("content", None)
    return message, rest, changes


def _calls_in_text(text: str) -> tuple[str | None, list[Any] | None]:
    """Return an answer without the calls that it has as letters, and the calls; None if there are none, or one is odd.

    The letters are those of Hermes and Qwen: JSON with a name and arguments between `<tool_call>` and `</tool_call>`.
    """
    calls = []
    for written in _CALL_IN_TEXT.findall(text):
        try:
            call = loads_strict(written)
        except ValueError:
            return text, None
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str) or "arguments" not in call:
            return text, None
        calls.append(call)
    return (_CALL_IN_TEXT.sub("", text).strip() or None, calls) if calls else (text, None)


def _own_keys(item: Mapping[str, Any], layout: Layout) -> tuple[dict[str, Any], list[Change]]:
    """Return a message with our names of the declared keys, without its role and without keys that have no value.

    Tables and servers pad messages with such keys. The content of a message with calls may be null.
    """
    renamed = dict(item)
    for ours, theirs in layout.message_keys.items():
        if ours in _CALL_KEYS and theirs in renamed:
            renamed[ours] = renamed.pop(theirs)
    for key in dict.fromkeys((layout.message_keys.get("role", "role"), "role", "from")):
        if layout.role(renamed.get(key)):
            del renamed[key]
    texts = (*CONTENT, layout.message_keys.get("content", "content"))
    kept = {key: value for key, value in renamed.items() if not _is_padding(key, value, texts)}
    return kept, [changed("null-keys")] if len(kept) < len(renamed) else []


def _is_padding(key: str, value: Any, texts: Sequence[str]) -> bool:
    if value is None:
        return key != "content"
    if key == "prefix" and value is False:
        # Mistral's own default
        return True
    return value in ("", []) and key not in texts


def _content(
    item: dict[str, Any], role: str, place: Place, layout: Layout
) -> tuple[Any, Any, dict[str, Any], list[Change]]:
    """Return the content, the tool calls among its chunks or None, the other keys of the message, and the changes.

    The key `content` stays in the keys if the message has it.
    """
    rest, changes = dict(item), []
    declared = layout.message_keys.get("content")
    key = declared or next((key for key in CONTENT if rest.get(key) is not None), "content")
    value = rest.get(key)
    if key != "content":
        rest.pop(key, None)
        if key == "text":
            changes.append(changed("content-key"))
    if isinstance(refusal := rest.pop("refusal", None), str):
        changes.append(lost("refusals", place=place / "refusal") if value else changed("refusals"))
        value = value or refusal
    if isinstance(value, Sequence) and not isinstance(value, str):
        objects = [chunk for chunk in value if not isinstance(chunk, str)]
        if all(isinstance(chunk, Mapping) and ("type" in chunk or "text" in chunk) for chunk in objects):
            content, called, more = _chunks(value, role, place / key, layout)
            return content, called, rest, changes + more
    if role == "tool" and isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        changes.append(changed("result-text"))
        value = json.dumps(value, ensure_ascii=False)
    return value, None, rest, changes


def _chunks(chunks: Sequence[Any], role: str, place: Place, layout: Layout) -> tuple[Any, Any, list[Change]]:
    """Return the chunks of a content under our names, or as one text, the tool calls among them, and the changes."""
    changes: list[Change] = []
    found: list[dict[str, Any]] = []
    calls: list[Any] = []
    joined = layout.joined
    for index, given in enumerate(chunks):
        chunk = {"type": "text", "text": given} if isinstance(given, str) else dict(given)
        if any(chunk.pop(key, None) is not None for key in ("train", "weight")):
            changes.append(lost("part-weights", place=place / index))
        chunk = {key: value for key, value in chunk.items() if value is not None}
        kind = chunk.get("type")
        ours = _chunk_type(kind)
        types = chunk_types()
        if ours in MEDIA_PARTS and ours not in types:
            changes.append(lost("media", str(kind), place / index))
            continue
        if ours == "tool_use" and role == "assistant":
            calls.append({_TOOL_USE[key]: value for key, value in chunk.items() if key in _TOOL_USE})
            others = [other for other in chunk if other not in {"type", *_TOOL_USE}]
            changes += [lost("message-keys", other, place / index / other) for other in others]
            continue
        if ours is None or (ours not in types and ours != "tool_call"):
            found.append(chunk)  # the check of the row reports it
            continue
        key = ours if ours in chunk else next((key for key in CONTENT if key in chunk), "")
        value, read = chunk.get(key), {"type", key}
        if ours == "tool_call":
            calls.append(from_json(value, changes, place / index))
        else:
            joined = joined or (ours == "text" and key != ours)
            found.append(types[ours].from_foreign(chunk, value))
            read |= found[-1].keys()
        changes += [lost("message-keys", other, place / index / other) for other in chunk if other not in read]
    if joined and all(chunk["type"] == "text" and isinstance(chunk.get("text"), str) for chunk in found):
        # trainers with such chunks join them without a blank line
        text = "".join(chunk["text"] for chunk in found)
        return text if text or not calls else None, calls or None, [*changes, changed("chunks")]
    if found != list(chunks):
        changes.append(changed("chunks"))
    return found if found or not calls else None, calls or None, changes


def _chunk_type(name: Any) -> str | None:
    """Return our name of a type of chunk; one without a type is a text, and a value that is no name has none."""
    if not isinstance(name, str):
        return "text" if name is None else None
    return next((ours.name for ours in chunk_types().values() if name in ours.foreign_names), name)


def _thoughts(item: Mapping[str, Any], layout: Layout) -> dict[str, str]:
    """Return the texts of the thinking of a message, by their keys."""
    declared = layout.message_keys.get("thinking")
    keys = (declared, *THOUGHTS) if declared else THOUGHTS
    return {key: item[key] for key in keys if isinstance(item.get(key), str)}


def _with_thoughts(content: Any, thoughts: Mapping[str, str]) -> Any:
    """Return a content behind its thinking; the check of the row reports a content that cannot have thinking."""
    if not isinstance(content, str | list | None):
        return content
    texts = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
    # two servers' names for one text
    return [*map(THINKING.chunk, dict.fromkeys(thoughts.values())), *texts]


def _weigh(
    message: dict[str, Any], item: Mapping[str, Any], place: Place, layout: Layout, weight: int | None
) -> tuple[dict[str, Any], list[Change]]:
    """Turn flags of training into the weight of an answer; return the other keys of the message, and the changes."""
    rest, changes = dict(item), []
    declared = layout.message_keys.get("weight", "")
    flags = {declared: 1, **FLAGS} if declared else FLAGS
    found: set[float] = set()
    for key in [key for key in flags if key in rest]:
        value, trains = rest.pop(key), flags[key]
        if value is None:
            continue
        if not isinstance(value, bool | int | float):
            raise error_at(place / key, repr(value), "true, false or a number")
        if key != "weight" or type(value) is not int:
            changes.append(changed("weights", key if trains else f"{key}, of which true is 0"))
        found.add(float(value if trains else not value))
    if len(found) > 1:
        raise error_at(place, "flags of training that contradict each other", "one of them")
    if message["role"] != "assistant":
        if any(found) or (not found and message["role"] in (layout.trained or ())):
            changes.append(lost("trained-prompts", place=place))
    elif found:
        value = found.pop()
        if value not in (0, 1):
            changes.append(lost("weights", f"{value:g}", place))
        message["weight"] = int(bool(value))
        if weight == 0 and value:
            # a flag takes a loss away, and gives none back
            message["weight"] = 0
            changes.append(changed("prompt-weights"))
    elif layout.trained is not None and "assistant" not in layout.trained:
        message["weight"] = 0
        changes.append(changed("untrained-roles"))
    elif weight is not None:
        message["weight"] = weight
        changes.append(changed("prompt-weights"))
    return rest, changes


def _results(
    message: Mapping[str, Any], item: Mapping[str, Any], place: Place, calls: ToolCalls, *, is_last: bool
) -> tuple[list[dict[str, Any]], dict[str, Any], list[Change]]:
    """Return the results of a tool message with the ids of their calls, the remaining keys, and the changes.

    Args:
        message: The message.
        item: Its other keys.
        place: Its place.
        calls: The tool calls of the row so far.
        is_last: Whether no other result follows: a result without an id then answers all open calls.

    Raises:
        RowError: If the result answers no call, or not all open calls.
    """
    rest = {key: value for key, value in item.items() if key != "tool_call_id"}
    call_id = item.get("tool_call_id")
    if call_id is None and is_last and len(calls.open) > 1 and not calls.as_given:
        texts = _listed_results(message.get("content"), place, len(calls.open))
        results = [
            {"role": "tool", "content": text, "tool_call_id": open_id}
            for (open_id, _), text in zip(calls.open, texts, strict=True)
        ]
        calls.open = []
        return results, rest, [changed("results-split")]
    changes: list[Change] = []
    name = rest.pop("name", None)
    answered = call_id if calls.as_given else calls.answered(call_id, name, changes, place)
    result = {**message, "tool_call_id": answered, "name": name}
    result = {key: value for key, value in result.items() if value is not None or key == "content"}
    return [result], rest, changes


def _listed_results(content: Any, place: Place, count: int) -> list[str]:
    """Return the texts of a result that lists a text for each of several calls."""
    try:
        results = loads_strict(content) if isinstance(content, str) else None
    except ValueError:
        results = None
    if not isinstance(results, list) or len(results) != count:
        raise error_at(place, f"one result for {count} calls", "a result for each call, or a list of them")
    return [result if isinstance(result, str) else json.dumps(result, ensure_ascii=False) for result in results]


def _left_out(item: Mapping[str, Any], place: Place) -> list[Change]:
    changes = []
    for key in item:
        kind = "message-keys"
        if key in MEDIA_PARTS:
            kind = "media"
        elif key == "name":
            kind = "names"
        changes.append(lost(kind, key, place / key))
    return changes
