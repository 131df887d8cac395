"""A row as mistral-common's request, quickly for plain texts; and the fields that only some tokenizers encode."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.fields import without_nulls
from pytest_mistral_lora.chat.oracle.versions import VersionFacts
from pytest_mistral_lora.chat.rows import Row, native_content, require_chat, weight_of


@dataclass(frozen=True, slots=True)
class RowFeatures:
    """The fields of a row that only some tokenizers encode.

    Attributes:
        thinking: Whether answers may have thinking chunks.
        efforts: The values of `reasoning_effort`, in the tokenizer's order; empty if it has no such setting.
        schemas: Whether the schema of a `response_format` is shown to the model.
    """

    thinking: bool = False
    efforts: tuple[str, ...] = ()
    schemas: bool = False

    @classmethod
    def of(cls, facts: VersionFacts, literals: Collection[str], builder: Any) -> RowFeatures:
        """Return the features of a tokenizer.

        Args:
            facts: The facts of its version.
            literals: Its control tokens.
            builder: mistral-common's `ModelSettingsBuilder` of the file, or None.
        """
        # a file of an older version may have the two markers, and its encoder does not use them
        thinking = THINKING.is_written_by(facts) and {*THINKING.literals} <= {*literals}
        # an older mistral-common does not have all fields of a builder
        effort = getattr(builder, "reasoning_effort", None)
        efforts = () if effort is None else tuple(str(value) for value in effort.values)
        return cls(thinking, efforts, getattr(builder, "json_schema", None) is not None)


def request_data(row: Row) -> dict[str, Any]:
    """Return the request of a row as plain data, without nulls.

    Raises:
        RowError: If the row is not a conversation.
    """
    require_chat(row)
    messages = []
    for message in row.messages:
        data = without_nulls(message)
        if "content" in data:
            data["content"] = native_content(data["content"])
        if data["role"] == "assistant":
            # An absent weight is 1, so that a spelled-out 1 does not split a turn.
            data["weight"] = weight_of(message)
            data["tool_calls"] = [_call_data(call) for call in data.get("tool_calls", ())] or None
        messages.append(data)
    settings: dict[str, Any] = {} if row.reasoning_effort is None else {"reasoning_effort": row.reasoning_effort}
    if row.response_format is not None:
        # but not within the schema, where a null is a value
        settings["response_format"] = given = without_nulls(row.response_format)
        if named := given.get("json_schema"):
            given["json_schema"] = without_nulls(named)
    tools = [{"type": "function", "function": without_nulls(tool["function"])} for tool in row.tools or ()]
    return {"messages": messages, "tools": tools or None, **settings}


def _call_data(call: Mapping[str, Any]) -> dict[str, Any]:
    # mistral-common reads null as no arguments, and refuses a call whose arguments are absent
    function = {key: value for key, value in call["function"].items() if value is not None or key == "arguments"}
    return {**without_nulls(call), "function": function}


# The shortcut for most rows: one request of mistral-common for each sequence of roles, filled with the texts. A
# conversation of texts is refused, ordered and joined by its roles and weights alone. So mistral-common's own models,
# validator and normalizer run on the first row of each sequence, and the rows after it only put their texts into the
# result. Every other row takes the whole path: one with tools, calls, chunks, settings, empty texts, or a sequence that
# mistral-common refuses or joins.
_SHAPES = 512
_LONGEST = 100_000
"""Characters of a row that a filled request may keep alive; for a longer row, the whole path costs little."""
_TOOLS = 1024
_PLAIN_KEYS = frozenset(("role", "content", "weight"))


class _Filled(NamedTuple):
    """A normalised request, and for each message of the row the object and the field that hold its text."""

    request: Any
    slots: list[tuple[Any, str]]


class PlainRows:
    """Makes normalised requests for rows of plain texts."""

    def __init__(self, normalised: Callable[[Row], Any]) -> None:
        """Use `normalised`, which validates a row and returns mistral-common's normalised request."""
        self._normalised = normalised
        self._shapes: dict[tuple[Any, ...], _Filled | None] = {}

    def request(self, row: Row) -> Any:
        """Return the normalised request of a row, or None if it must take the whole path."""
        if row.tools or row.reasoning_effort is not None or row.response_format is not None:
            return None
        shape: list[Any] = []
        texts: list[str] = []
        for message in row.messages:
            role, text = message["role"], message.get("content")
            # the text of a tool's result is parsed as JSON
            if type(text) is not str or not text or role == "tool" or not message.keys() <= _PLAIN_KEYS:
                return None
            shape.append(role if message.get("weight") != 0 else "without loss")
            texts.append(text)
        if sum(map(len, texts)) > _LONGEST:
            return None
        key = tuple(shape)
        if key not in self._shapes:
            if len(self._shapes) >= _SHAPES:
                self._shapes.clear()
            self._shapes[key] = self._shape(row, texts)
        filled = self._shapes[key]
        if filled is None:
            return None
        for (owner, name), text in zip(filled.slots, texts, strict=True):
            setattr(owner, name, text)
        return filled.request

    def _shape(self, row: Row, texts: list[str]) -> _Filled | None:
        """Return the request of a sequence of roles, or None if the texts alone do not decide the request."""
        # unique markers that no library strips, joins or parses
        marks = [f"text {number} of {len(texts)}" for number in range(1, len(texts) + 1)]
        messages = tuple({**message, "content": mark} for message, mark in zip(row.messages, marks, strict=True))
        try:
            request, expected = self._normalised(Row(messages)), self._normalised(row)
        except Exception:
            # the whole path refuses the row with its reason
            return None
        found: dict[Any, tuple[Any, str]] = {}
        for owner, name in ((request, "system_prompt"), *((message, "content") for message in request.messages)):
            text = getattr(owner, name, None)
            if isinstance(text, str):
                found[text] = (owner, name)
        if found.keys() - {None, ""} != set(marks):
            return None
        filled = _Filled(request, [found[mark] for mark in marks])
        for (owner, name), text in zip(filled.slots, texts, strict=True):
            setattr(owner, name, text)
        # a mistral-common that looks at the texts shows with the first row
        return filled if request == expected else None


def remember_tools(validator: Any) -> Any:
    """Make a validator of mistral-common check each tool once, and return it: the rows of a dataset share a few tools.

    The check of a tool's schema takes longer than all else of a row. A tool that is refused is checked each time.
    """
    check = getattr(validator, "_validate_function", None)
    if check is None:
        return validator
    accepted: set[tuple[str, str]] = set()

    def once(function: Any) -> None:
        try:
            # the key keeps the order and the types of all values
            key = function.name, json.dumps(function.parameters)
        except (TypeError, ValueError, RecursionError):
            # the row was made in code, and mistral-common refuses it later
            check(function)
            return
        if key not in accepted:
            check(function)
            if len(accepted) >= _TOOLS:
                accepted.clear()
            accepted.add(key)

    # rows with tools take 25 % less CPU time: benchmarks/patches.py, tools
    validator._validate_function = once
    return validator
