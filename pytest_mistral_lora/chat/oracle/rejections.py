"""Explain in a dataset author's words why mistral-common rejects a conversation, and in which field.

mistral-common names neither the field nor the message index, so the table below finds them in the row. A reason that
is not in the table is passed on in mistral-common's words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.oracle.versions import Fact, VersionFacts, names_with
from pytest_mistral_lora.chat.remedies import import_command
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import OracleRejection

_Path = tuple[str | int, ...]
"""The steps to a field of a row."""


def explain(error: Exception, row: Row, version: str) -> OracleRejection:
    """Return the rejection of `row` by the tokenizer `version`, with the field if it can be found."""
    reason = str(error) or type(error).__name__
    for rejection in _REJECTIONS:
        match = re.search(rejection.pattern, reason)
        if match:
            path = rejection.field(row, match) if callable(rejection.field) else rejection.field
            found = rejection.found if isinstance(rejection.found, str) else rejection.found(row)
            found = match.expand(found) if found else match.group(0)
            step = f"To give each call such an id: {import_command(row.place)}" if rejection.expected == _NINE else ""
            expected = rejection.expected if isinstance(rejection.expected, str) else rejection.expected(row)
            return OracleRejection(
                f"{found} (tokenizer {version})", place=row.place.within(*path), expected=expected, next_step=step
            )
    return OracleRejection(f"mistral-common refuses the conversation (tokenizer {version}): {reason}", place=row.place)


def version_violation(facts: VersionFacts, literals: Collection[str]) -> str:
    """Return why a vocabulary with these control tokens is not of a version; empty if it can be.

    SentencePiece encodes a marker that it does not have as `<unk>`, so that a wrong version would go unnoticed.
    """
    markers = {"[INST]": "[INST]" in facts.control_tokens}
    # later vocabularies of an older version have the marker, too
    if "[SYSTEM_PROMPT]" in facts.control_tokens:
        markers["[SYSTEM_PROMPT]"] = True
    for marker, expected in markers.items():
        if (marker in literals) is not expected:
            return f"its version is {facts.name}, but its vocabulary has {'no' if expected else 'a'} {marker}"
    return ""


def taken_by(fact: Fact) -> str:
    """Return the versions that take a row because of a fact, in words: `from v2 on`."""
    return names_with(fact, from_then_on="from {} on", only="of {}, not of a later version,")


def is_our_call(error: Exception) -> bool:
    """Return whether our call of mistral-common raised the error, not code inside it: then the row is not the cause."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return isinstance(error, AttributeError | TypeError) and module.startswith("pytest_mistral_lora.")


def _call_id(row: Row, match: re.Match[str]) -> _Path:
    """Return the field of the tool-call id that the message quotes, else of the first missing id."""
    wanted = match.groups() or (None, "null", "")
    for index, message in enumerate(row.messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            if ("null" if call.get("id") is None else call["id"]) in wanted:
                return "messages", index, "tool_calls", number, "id"
        if message["role"] == "tool" and message.get("tool_call_id") in wanted:
            return "messages", index, "tool_call_id"
    return ("messages",)


def _function_name(row: Row, match: re.Match[str]) -> _Path:
    names: list[tuple[_Path, Any]] = [
        (("tools", n, "function", "name"), tool["function"]["name"]) for n, tool in enumerate(row.tools or ())
    ]
    for index, message in enumerate(row.messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            names.append((("messages", index, "tool_calls", number, "function", "name"), call["function"]["name"]))
        names.append((("messages", index, "name"), message.get("name")))
    return next((path for path, name in names if name == match.group(1)), ())


def _role_pair(row: Row, match: re.Match[str]) -> _Path:
    roles = [message["role"] for message in row.messages]
    pairs = zip(roles[1:], roles, strict=False)
    return "messages", next((n for n, p in enumerate(pairs, 1) if p == match.groups()), 0), "role"


def _both_or_neither(row: Row, match: re.Match[str]) -> _Path:
    for index, message in enumerate(row.messages):
        if message["role"] == "assistant" and bool(message.get("content")) == bool(message.get("tool_calls")):
            return "messages", index
    return ("messages",)


def _both_or_empty(row: Row) -> tuple[str, str]:
    """Return which of the two the first such message is, and the right form."""
    for message in row.messages:
        if message["role"] == "assistant" and not message.get("content") and not message.get("tool_calls"):
            return "the assistant message is empty", "text or tool calls"
        if message["role"] == "assistant" and message.get("content") and message.get("tool_calls"):
            break
    return "the assistant message has both content and tool calls", "either text or tool calls"


def _text_beside_calls(row: Row, match: re.Match[str]) -> _Path:
    for group in row.assistant_groups():
        has_text = [bool(row.messages[index].get("content")) for index in group]
        if len(set(has_text)) > 1:
            return "messages", group[has_text.index(not has_text[0])]
    return ("messages",)


def _first_tool_turn(row: Row, match: re.Match[str]) -> _Path:
    turns = (n for n, m in enumerate(row.messages) if m["role"] == "tool" or m.get("tool_calls"))
    return "messages", next(turns, 0)


def _first_thought(row: Row, match: re.Match[str]) -> _Path:
    role = match.groupdict().get("role")
    for index, message in enumerate(row.messages):
        if THINKING.is_in(message.get("content")) and role in (None, message["role"]):
            return "messages", index, "content"
    return ("messages",)


def _thinkers(row: Row) -> str:
    """Return the tokenizers that take the thinking of a row; few versions take that of a system message."""
    of_system = any(message["role"] == "system" and THINKING.is_in(message.get("content")) for message in row.messages)
    versions = taken_by(lambda facts: facts.system_thinking if of_system else facts.thinking)
    return f"text only, or a tokenizer {versions} that has [THINK] and [/THINK]"


@dataclass(frozen=True)
class _Rejection:
    """A reason that mistral-common gives for a rejection.

    Attributes:
        pattern: A regular expression for its message.
        found: Our message, a template over the match, or a function that returns it for the row; empty for
            mistral-common's own.
        expected: The right form, or a function that returns it for the row.
        field: The field at fault, as a path in the row, or a function that finds it.
    """

    pattern: str
    found: str | Callable[[Row], str]
    expected: str | Callable[[Row], str]
    field: _Path | Callable[[Row, re.Match[str]], _Path] = ("messages",)


_NINE = "9 letters or digits (a-z, A-Z, 0-9)"
_REJECTIONS = (
    _Rejection(r"(?s)Tool call id was (.*) but must be", r"tool-call id '\1'", _NINE, _call_id),
    _Rejection(r"Tool call id (?:of assistant|has to be)", "no tool-call id", _NINE, _call_id),
    _Rejection(r"Tool call id must be a non-empty", "no tool-call id", "a non-empty tool-call id", _call_id),
    _Rejection(r"Tool call id 'null'", "no tool-call id", _NINE, _call_id),
    _Rejection(
        r"Unexpected role '(\w+)' after role '(\w+)'",
        r"role '\1' straight after role '\2'",
        "a system or user message first, then user and assistant in turn, tool results after tool calls",
        _role_pair,
    ),
    _Rejection(
        r"Expected last role Assistant for finetuning but got (?:Roles\.)?(\w+)",
        r"the conversation ends with role '\1'",
        "an assistant message last: a row is trained on the assistant's answer",
        lambda row, _: ("messages", len(row.messages) - 1, "role"),
    ),
    _Rejection(
        r"Expected last role User or Tool",
        "the last assistant message follows another assistant message, so no prompt asks for it",
        "a user or tool message before the last assistant message",
        lambda row, _: ("messages", len(row.messages) - 1, "role"),
    ),
    _Rejection(
        r"Conversation must start with a user message or system message",
        "the conversation has only an assistant message",
        "a system or user message first",
    ),
    _Rejection(
        r"Conversation must have at least one message",
        "nothing comes before the last assistant message, so no prompt asks for it",
        "a system or user message first",
    ),
    _Rejection(
        r"must have either content or tool_calls, but not both|Tool calls and content cannot be used together",
        lambda row: _both_or_empty(row)[0],
        lambda row: _both_or_empty(row)[1],
        _both_or_neither,
    ),
    _Rejection(
        r"Cannot have tool calls and content defined",
        "consecutive assistant messages are one turn, and this one would have both text and tool calls",
        f"either text or tool calls, or a tokenizer {taken_by(lambda facts: facts.text_beside_calls)}",
        _text_beside_calls,
    ),
    _Rejection(r"Invalid assistant message", "the assistant message is empty", "text or tool calls", _both_or_neither),
    _Rejection(
        r"(?s)Function name was (.*) but must be",
        r"function name '\1'",
        "1 to 64 letters, digits, underscores or dashes",
        _function_name,
    ),
    _Rejection(
        r"Not the same number of function calls and responses|More tool responses than tool calls",
        "tool calls and tool results do not pair up",
        "one tool message for each tool call, before the next assistant message",
        _first_tool_turn,
    ),
    _Rejection(
        r"Tools not implemented for tokenizer V1",
        "tool messages, which tokenizer v1 does not have",
        f"a conversation without tools, or a tokenizer {taken_by(lambda facts: facts.tools_in)}",
        _first_tool_turn,
    ),
    _Rejection(
        r"Tokenizer v2 does not support multiple tool results",
        "several tool results for one assistant turn",
        f"one tool result, or a tokenizer {taken_by(lambda facts: facts.parallel_calls)}",
        _first_tool_turn,
    ),
    _Rejection(
        r"Unexpected content chunk types in (?P<role>\w+) message: \['ThinkChunk'\]",
        r"thinking in a message with role '\g<role>'",
        _thinkers,
        _first_thought,
    ),
    _Rejection(
        r"Think not implemented for tokenizer|think tokens are not available",
        "thinking, which this tokenizer has no tokens for",
        _thinkers,
        _first_thought,
    ),
    _Rejection(
        r"reasoning_effort=.* is not supported for this model|reasoning_effort not supported",
        "a model setting, which this tokenizer does not have",
        f"no reasoning_effort, or a tokenizer {taken_by(lambda facts: facts.settings)}",
        ("reasoning_effort",),
    ),
    _Rejection(
        r"reasoning_effort should be one of \[(.*)\], got (\w+)",
        r"'\2' is not a reasoning effort of this model",
        "one of those that the tokenizer's model_settings_builder lists",
        ("reasoning_effort",),
    ),
    _Rejection(
        r"(?s)reasoning_effort\s+Input should be ('none'.*?) \[",
        "not a reasoning effort",
        "one of those that mistral-common knows, or none",
        ("reasoning_effort",),
    ),
    _Rejection(
        r"(?s)response_format\.json_schema\.schema\s+(?:Value error, )?(.*?) \[type",
        r"the schema is not a JSON Schema: \1",
        "JSON Schema draft 7",
        ("response_format", "json_schema", "schema"),
    ),
    _Rejection(
        r"Invalid tool schema: (.*)", r"the parameters are not a JSON Schema: \1", "JSON Schema draft 7", ("tools",)
    ),
    _Rejection(
        r"(?:Duplicate|Unexpected) tool call id (.*)(?= in )", "", "each tool call answered once, by its id", _call_id
    ),
)
