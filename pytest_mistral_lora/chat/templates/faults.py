"""The named faults of chat templates: a closed table of the ways in which published ones differ from mistral-common.

A fault is named only if it is proven on the row: its change alters the row for one side alone. If mistral-common
encodes the changed row differently and the template renders it as before, the template ignores what was changed. If
the template renders it differently and mistral-common encodes it as before, the template reads this form wrongly. The
rest of the row is then compared in its changed form, so that one fault hides no other.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.oracle.versions import VersionFacts
from pytest_mistral_lora.chat.rows import Row, has_more_than_text, merged_chunks, text_of, weight_of

OWN_PROMPT = "default-system-prompt"
"""The name of a template's own system prompt in a list of known deviations."""

Side = Literal["mistral-common", "template"]

_IGNORED: frozenset[Side] = frozenset({"mistral-common"})
"""The template renders the changed row as before: it ignores what was changed."""
_MISREAD: frozenset[Side] = frozenset({"template"})
"""mistral-common encodes the changed row as before: the template reads this form of it wrongly."""
_REFUSED: frozenset[Side] = frozenset()
"""Named only if the template refuses the row and takes the changed one."""

REASONING_DROPPED = "reasoning-content-dropped"
"""The name of a template that renders thinking chunks and drops the same thought as `reasoning_content`."""

_Message = Mapping[str, Any]
_Change = Callable[[Row, VersionFacts], Row]


@dataclass(frozen=True, slots=True)
class TemplateFault:
    """One way in which a template is wrong.

    Attributes:
        id: Its name in findings and in lists of known deviations.
        title: The template's behaviour, in words that follow "it".
        sides: The sides that may see another row after the change: the proof that the template has the fault.
        change: Changes a row so that the difference goes away; returns the row itself if it does not have the form.
            It takes the row and the facts of the tokenizer version.
    """

    id: str
    title: str
    sides: frozenset[Side]
    change: _Change

    @property
    def words(self) -> str:
        """The title with the name that accepts the fault."""
        return f"it {self.title} ({self.id})"

    def changed(self, row: Row, facts: VersionFacts) -> Row | None:
        """Return the changed row, or None if the change leaves the row the same."""
        changed = self.change(row, facts)
        return None if changed is row or changed == row else changed


def each_message(change: Callable[[_Message], _Message | None]) -> _Change:
    """Return a change of a row that changes each message, or leaves it out if the change of it is None."""

    def changed(row: Row, facts: VersionFacts) -> Row:
        messages = [new for message in row.messages if (new := change(message)) is not None]
        is_same = len(messages) == len(row.messages) and all(map(_is, messages, row.messages))
        return row if is_same else replace(row, messages=tuple(messages))

    return changed


def _is(first: object, second: object) -> bool:
    return first is second


def _without(message: _Message, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def _content_beside_calls(message: _Message) -> _Message:
    is_bare = message.get("tool_calls") and message.get("content") is None
    return {**message, "content": ""} if is_bare else message


def _no_content_beside_calls(message: _Message) -> _Message:
    return _without(message, "content") if message.get("tool_calls") and message.get("content") else message


def _no_thinking(message: _Message) -> _Message:
    content = message.get("content")
    return {**message, "content": text_of(content)} if has_more_than_text(content) else message


def _closed_thinking(message: _Message) -> _Message:
    content = message.get("content")
    if not THINKING.is_in(content) or all(map(THINKING.is_closed, content or ())):
        return message
    return {**message, "content": [_without(chunk, "closed") for chunk in content or ()]}


def _arguments_parsed(message: _Message) -> _Message:
    """Write the arguments of tool calls as objects if the row has them as JSON text."""
    calls = []
    for call in message.get("tool_calls") or ():
        arguments = call["function"].get("arguments")
        try:
            value = json.loads(arguments) if isinstance(arguments, str) else None
        except ValueError:
            value = None
        is_object = isinstance(value, dict)
        calls.append({**call, "function": {**call["function"], "arguments": value}} if is_object else call)
    is_same = all(map(_is, calls, message.get("tool_calls") or ()))
    return message if is_same else {**message, "tool_calls": calls}


def _result_quoted(message: _Message) -> _Message:
    """Write a tool result that is not JSON as a JSON string, which mistral-common reads as the same text."""
    content = message.get("content")
    if message["role"] != "tool" or not isinstance(content, str):
        return message
    try:
        json.loads(content)
    except ValueError:
        return {**message, "content": json.dumps(content, ensure_ascii=False)}
    return message


def _stripped(role: str) -> Callable[[_Message], _Message]:
    def changed(message: _Message) -> _Message:
        content = message.get("content")
        if message["role"] != role or not content:
            return message
        new = (
            content.strip()
            if isinstance(content, str)
            else [{**chunk, "text": chunk["text"].strip()} if chunk.get("text") else chunk for chunk in content]
        )
        return message if new == content else {**message, "content": new}

    return changed


def _chunks_joined(row: Row, facts: VersionFacts) -> Row:
    """Write text chunks as one text."""

    def changed(message: _Message) -> _Message:
        content = message.get("content")
        if isinstance(content, str | None) or has_more_than_text(content) or not content:
            return message
        texts = merged_chunks([content], facts)
        return {**message, "content": texts[0]["text"] if texts else ""}

    return each_message(changed)(row, facts)


def _neighbours_joined(row: Row, facts: VersionFacts) -> Row:
    """Join consecutive messages of the user, and of the assistant if they have one weight."""
    messages: list[_Message] = []
    for (role, _), run in itertools.groupby(row.messages, key=lambda message: (message["role"], weight_of(message))):
        group = list(run)
        if role not in ("user", "assistant") or len(group) == 1:
            messages += group
            continue
        chunks = merged_chunks((message.get("content") for message in group), facts)
        is_text = all(chunk["type"] == "text" for chunk in chunks)
        content = "\n\n".join(chunk["text"] for chunk in chunks) if is_text else chunks
        calls = [call for message in group for call in message.get("tool_calls") or ()]
        messages.append(
            {**group[0], **({"content": content} if content else {}), **({"tool_calls": calls} if calls else {})}
        )
    return row if len(messages) == len(row.messages) else replace(row, messages=tuple(messages))


def _system_joined(row: Row, facts: VersionFacts) -> Row:
    """Join the system messages at the front."""
    front = list(itertools.takewhile(lambda message: message["role"] == "system", row.messages))
    if len(front) < 2:
        return row
    joined = {"role": "system", "content": "\n\n".join(text_of(message.get("content")) for message in front)}
    return replace(row, messages=(joined, *row.messages[len(front) :]))


def _later_system_dropped(row: Row, facts: VersionFacts) -> Row:
    kept = (message for n, message in enumerate(row.messages) if not n or message["role"] != "system")
    messages = tuple(kept)
    return row if len(messages) == len(row.messages) else replace(row, messages=messages)


def _no_calls(row: Row, facts: VersionFacts) -> Row:
    """Leave out tools, calls and results; a last turn that calls a tool becomes a text."""
    if not any(message["role"] == "tool" or message.get("tool_calls") for message in row.messages):
        return row
    kept = [message for message in row.messages if message["role"] != "tool" and not message.get("tool_calls")]
    if row.messages[-1].get("tool_calls"):
        kept.append({"role": "assistant", "content": "."})
    return replace(row, messages=tuple(kept), tools=None)


FAULTS: tuple[TemplateFault, ...] = (
    TemplateFault(
        "call-without-content-refused",
        "refuses a tool call that has no content beside it",
        _MISREAD,
        each_message(_content_beside_calls),
    ),
    TemplateFault(
        "neighbours-not-joined",
        "does not join consecutive messages of one role by a blank line",
        _MISREAD,
        _neighbours_joined,
    ),
    TemplateFault("chunks-not-joined", "does not join the text chunks of a message", _MISREAD, _chunks_joined),
    TemplateFault("several-system-messages", "does not take several system messages", _MISREAD, _system_joined),
    TemplateFault(
        "empty-system-prompt-written",
        "writes an empty system message",
        _MISREAD,
        each_message(lambda message: None if message["role"] == "system" and not message.get("content") else message),
    ),
    TemplateFault("tool-calls-refused", "refuses tool calls and their results", _REFUSED, _no_calls),
    TemplateFault(
        "system-prompt-dropped",
        "drops the system prompt",
        _IGNORED,
        each_message(lambda message: None if message["role"] == "system" else message),
    ),
    TemplateFault(
        "later-system-message-dropped",
        "drops a system message behind the first message",
        _IGNORED,
        _later_system_dropped,
    ),
    TemplateFault("tools-not-rendered", "does not render the tools", _IGNORED, lambda row, _: replace(row, tools=None)),
    TemplateFault("thinking-dropped", "drops thinking", _IGNORED, each_message(_no_thinking)),
    TemplateFault(
        "open-thinking-closed", "closes thinking that is left open", _IGNORED, each_message(_closed_thinking)
    ),
    TemplateFault(
        "content-beside-call-dropped",
        "drops the text beside a tool call",
        _IGNORED,
        each_message(_no_content_beside_calls),
    ),
    TemplateFault(
        "arguments-quoted-twice",
        "quotes the arguments of tool calls again if they are text",
        _MISREAD,
        each_message(_arguments_parsed),
    ),
    TemplateFault(
        "results-not-quoted",
        "writes the text of a tool result without quotes",
        _MISREAD,
        each_message(_result_quoted),
    ),
    *(
        TemplateFault(f"{name}-stripped", f"strips white space around {title}", _IGNORED, each_message(_stripped(role)))
        for role, name, title in (
            ("user", "user-text", "the user's text"),
            ("assistant", "answer", "an answer"),
            ("system", "system-prompt", "the system prompt"),
            ("tool", "result", "a tool result"),
        )
    ),
)
"""Every named fault. The changes are tried in this order: those of forms that templates refuse come first."""

CAUSE_NAMES: frozenset[str] = frozenset({OWN_PROMPT, REASONING_DROPPED, *(fault.id for fault in FAULTS)})
"""The names by which a list of known deviations accepts one cause."""
