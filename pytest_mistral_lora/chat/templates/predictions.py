"""Predict from a row the text that the official generated template writes: the rules behind the named deviations."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pytest_mistral_lora.chat.chunks.registry import type_of
from pytest_mistral_lora.chat.oracle.versions import VersionFacts
from pytest_mistral_lora.chat.rows import Row, has_more_than_text, is_text_chunk, merged_chunks, text_of, weight_of
from pytest_mistral_lora.chat.templates.faults import each_message

_NO_ID = (None, "", "null")
"""The ids of a call that mistral-common takes for none."""

_dumps = functools.partial(json.dumps, ensure_ascii=False)


def tool_calls_as_written(row: Row, facts: VersionFacts) -> list[str]:
    """Return the tool calls with string arguments pasted in: one JSON list for each turn with calls.

    A call with markers is not JSON: these are the arguments of each call.
    """
    turns = [[call for message in run for call in message.get("tool_calls") or ()] for run in _runs(row, "assistant")]
    if facts.calls_as == "markers":
        return [_pasted(call) for calls in turns for call in calls]
    written = []
    for calls in filter(None, turns):
        texts = [f'{{"name": "{call["function"]["name"]}", "arguments": {_pasted(call)}' for call in calls]
        ends = [f', "id": "{call.get("id")}"}}' if facts.writes_call_ids else "}" for call in calls]
        written.append(f"[{', '.join(text + end for text, end in zip(texts, ends, strict=True))}]")
    return written


def _pasted(call: Mapping[str, Any]) -> str:
    arguments = call["function"].get("arguments")
    return arguments or "{}" if isinstance(arguments, str) else _dumps(arguments)


def tool_results_as_strings(row: Row, facts: VersionFacts) -> list[str]:
    """Return the text of each tool result: bare, or within JSON as a string unless it is a plain number."""
    results = []
    for message in row.messages:
        if message["role"] != "tool":
            continue
        content = message["content"]
        text = content if isinstance(content, str) else str([dict(chunk) for chunk in content])
        if facts.result_chunks and not isinstance(content, str):
            text = "".join(chunk["text"] for chunk in content)
        elif facts.results_as == "name":
            text = f"[{_dumps({'name': message.get('name'), 'content': _number(text)})}]"
        elif facts.results_as == "id":
            text = _dumps({"content": _number(text), "call_id": message.get("tool_call_id")})
        results.append(text)
    return results


def _number(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            if str(kind(text)) == text:
                return kind(text)
        except (ValueError, OverflowError):
            continue
    return text


def weights_equal(row: Row, facts: VersionFacts) -> Row:
    """Give consecutive assistant messages of unequal weight the same weight."""
    if all(len({weight_of(message) for message in run}) == 1 for run in _runs(row, "assistant")):
        return row
    messages = tuple({key: value for key, value in message.items() if key != "weight"} for message in row.messages)
    return replace(row, messages=messages)


def empty_messages_dropped(row: Row, facts: VersionFacts) -> Row:
    """Drop the empty texts among messages and chunks that are joined to one text."""
    joined = ("user", "assistant")
    messages: list[Mapping[str, Any]] = []
    for role, run in itertools.groupby(row.messages, key=lambda message: message["role"]):
        texts = []
        for message in run:
            content = message.get("content")
            if not isinstance(content, str | None) and role != "tool":
                kept = [chunk for chunk in content if not is_text_chunk(chunk) or text_of([chunk])] or content[:1]
                message = message if kept == content else {**message, "content": kept}
            texts.append(message)
        full = [
            message
            for message in texts
            if text_of(message.get("content"))
            or has_more_than_text(message.get("content"))
            or message.get("tool_calls")
        ]
        messages += full or texts[:1] if role in joined else texts
    if facts.system_in != "own-turn":
        # within a user's turn all system messages are one text; a list of empty chunks still counts as a part of it.
        prompts = [message for message in messages if message["role"] == "system"]
        full = [message for message in prompts if message["content"]] or prompts[:1]
        messages = [
            message for message in messages if message["role"] != "system" or any(message is prompt for prompt in full)
        ]
    return row if tuple(messages) == row.messages else replace(row, messages=tuple(messages))


def system_first(row: Row, facts: VersionFacts) -> Row:
    """Move system messages to the front if one stands between two user messages."""
    runs = [role for role, _ in itertools.groupby(message["role"] for message in row.messages)]
    if ("user", "system", "user") not in zip(runs, runs[1:], runs[2:], strict=False):
        return row
    ordered = sorted(row.messages, key=lambda message: message["role"] != "system")
    return replace(row, messages=tuple(ordered))


def results_in_call_order(row: Row, facts: VersionFacts) -> Row:
    """Put the results of each turn's tool calls in the order of the calls."""
    messages: list[Mapping[str, Any]] = []
    order: dict[Any, int] = {}
    for role, run in itertools.groupby(row.messages, key=lambda message: message["role"]):
        group = list(run)
        if role == "tool":
            group.sort(key=lambda message: order.get(message.get("tool_call_id"), len(order)))
            order = {}
        for message in group if role == "assistant" else ():
            order |= {call.get("id"): len(order) + n for n, call in enumerate(message.get("tool_calls") or ())}
        messages += group
    return row if tuple(messages) == row.messages else replace(row, messages=tuple(messages))


def thinking_left_open_joined(row: Row, facts: VersionFacts) -> Row:
    """Join a thinking chunk that is not closed and the text straight after it into one thinking chunk."""
    messages: list[Mapping[str, Any]] = []
    for role, run in itertools.groupby(row.messages, key=lambda message: message["role"]):
        group = list(run)
        for turn in [group] if role == "assistant" else [[message] for message in group]:
            chunks = merged_chunks((message.get("content") for message in turn), facts)
            joined = chunks[:1]
            for before, chunk in itertools.pairwise(chunks):
                if chunk["type"] == "text" and not type_of(before).is_closed(before):
                    joined[-1][before["type"]] += chunk["text"]
                else:
                    joined.append(chunk)
            if len(joined) == len(chunks):
                messages += turn
                continue
            calls = [call for message in turn for call in message.get("tool_calls") or ()]
            messages.append({**turn[0], "content": joined} | ({"tool_calls": calls} if calls else {}))
    return row if tuple(messages) == row.messages else replace(row, messages=tuple(messages))


def question_first(row: Row, facts: VersionFacts) -> Row:
    """Put a question before the answer or the tool results that a row begins with, and calls before results.

    Up to v3 a system prompt is a part of a question: it counts as none.
    """
    roles = [message["role"] for message in row.messages]
    prompts = itertools.takewhile(lambda role: facts.opens_with_user and role == "system", roles)
    start = len(list(prompts))
    results = list(itertools.takewhile(lambda message: message["role"] == "tool", row.messages[start:]))
    if not results and roles[start : start + 1] != ["assistant"]:
        return row
    before: list[Mapping[str, Any]] = [{"role": "user", "content": "a"}]
    if results:
        function = {"name": "a", "arguments": {}}
        calls = [{"id": message.get("tool_call_id"), "type": "function", "function": function} for message in results]
        before.append({"role": "assistant", "tool_calls": calls})
    return replace(row, messages=(*row.messages[:start], *before, *row.messages[start:]))


def _call_with_id(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = message.get("tool_calls") or ()
    written = [
        {**call, "id": f"{number:09}"} if call.get("id") in _NO_ID else call for number, call in enumerate(calls)
    ]
    return {**message, "tool_calls": written} if written != list(calls) else message


tool_calls_with_ids = each_message(_call_with_id)
"""Gives each tool call an id."""

tool_results_with_names = each_message(
    lambda message: {**message, "name": "a"} if message["role"] == "tool" and message.get("name") is None else message
)
"""Gives each tool result a name."""

empty_results_written = each_message(
    lambda message: (
        {**message, "content": "a"} if (message["role"], message.get("content")) == ("tool", []) else message
    )
)
"""Writes a text into each tool result that is an empty list of chunks."""


def _runs(row: Row, role: str) -> list[list[Mapping[str, Any]]]:
    grouped = itertools.groupby(row.messages, key=lambda message: message["role"])
    return [list(run) for name, run in grouped if name == role]
