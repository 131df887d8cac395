"""Rows, conversations and messages as plain JSON data."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pytest_mistral_lora.chat.fields import ROLES
from pytest_mistral_lora.chat.rows import text_of
from pytest_mistral_lora.strategies.texts import TextStrategy, hostile_text, plain_text

Message = dict[str, Any]
_WORDS = string.ascii_letters + string.digits + "_-"
_SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)


def rows(
    *,
    tools: bool | None = False,
    system: bool | None = None,
    weights: bool = False,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    alternating: bool = True,
    parallel: bool = False,
) -> SearchStrategy[dict[str, Any]]:
    """Generate chat rows that every tokenizer version accepts, or every version with tools where there are tools.

    Example:
        >>> from hypothesis import given
        >>> @given(rows(system=True, text=plain_text()))
        ... def law(row):
        ...     assert row["messages"][0]["role"] == "system"
        >>> law()

    Args:
        tools: False for rows without tools; True for rows with tools, tool calls and tool results; None for both.
        system: False for no system message; True for at least one; None for both.
        weights: Whether assistant messages may carry `weight` 0 or 1; a row may then have no supervised token.
        max_turns: The most user turns of a row, 1 or more.
        text: What messages say; plain and hostile text by default. Any message but the first may also repeat an
            earlier one. Assistant messages keep to texts that are more than spaces.
        alternating: False for consecutive user and assistant messages, system messages wherever they are allowed,
            conversations without a leading user message, and contents given as text chunks.
        parallel: Whether an assistant turn may make several tool calls (from v3 on).
    """
    if max_turns < 1:
        raise ValueError(f"max_turns is {max_turns}, and a row has at least 1 turn")
    choices = (False, True) if tools is None else (tools,)
    said = _any_text() if text is None else text
    return st.one_of(
        *(_rows(_Plan(choice, system, weights, max_turns, said, alternating, parallel)) for choice in choices)
    )


def tool_rows(
    *,
    parallel: bool = False,
    system: bool | None = None,
    weights: bool = False,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    alternating: bool = True,
) -> SearchStrategy[dict[str, Any]]:
    """Generate chat rows with tools, tool calls and tool results; the arguments are as for `rows`.

    At least one assistant message calls a tool, the last one of a row perhaps without a result. Arguments are an
    object or its JSON, results are JSON, numbers or text, and ids are 9 letters or digits.

    Example:
        >>> from hypothesis import given
        >>> @given(tool_rows(text=plain_text()))
        ... def law(row):
        ...     assert row["tools"] and any(message.get("tool_calls") for message in row["messages"])
        >>> law()
    """
    return rows(
        tools=True,
        system=system,
        weights=weights,
        max_turns=max_turns,
        text=text,
        alternating=alternating,
        parallel=parallel,
    )


def conversations(
    *,
    system: bool | None = None,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    alternating: bool = True,
) -> SearchStrategy[list[Message]]:
    """Generate the messages of rows without tools; the arguments are as for `rows`.

    Example:
        >>> from hypothesis import given
        >>> @given(conversations(system=False))
        ... def law(conversation):
        ...     assert [message["role"] for message in conversation[:2]] == ["user", "assistant"]
        >>> law()
    """
    return rows(system=system, max_turns=max_turns, text=text, alternating=alternating).map(_messages_of)


def messages(*, role: str | None = None, text: TextStrategy | None = None) -> SearchStrategy[Message]:
    """Generate single messages.

    Example:
        >>> from hypothesis import given
        >>> @given(messages(role="assistant"))
        ... def law(message):
        ...     assert message["content"].strip(" ")
        >>> law()

    Args:
        role: `system`, `user`, `assistant` or `tool`; None for any of the first three.
        text: What messages say; plain and hostile text by default.

    Raises:
        ValueError: If `role` is not a role.
    """
    if role is None:
        return st.one_of(*(messages(role=choice, text=text) for choice in ("user", "assistant", "system")))
    if role not in ROLES:
        raise ValueError(f"role is {role!r}, expected one of {', '.join(ROLES)}")
    content = _any_text() if text is None else text
    if role == "tool":
        return st.builds(_tool_message, _results(content, _objects(content)), _ids(), st.none() | _names())
    return st.builds(_message, st.just(role), content.filter(_speaks) if role == "assistant" else content)


@dataclass(frozen=True)
class _Plan:
    """What the rows of one strategy are like; the fields are the arguments of `rows`."""

    tools: bool
    system: bool | None
    weights: bool
    max_turns: int
    text: TextStrategy
    alternating: bool
    parallel: bool

    # each strategy is built once: building them anew for every draw takes most of the time

    @cached_property
    def weight(self) -> SearchStrategy[int | None]:
        return st.sampled_from((None, 1, 0)) if self.weights else st.none()

    @cached_property
    def call_ids(self) -> SearchStrategy[list[str]]:
        return st.lists(_ids(), min_size=1, max_size=3 if self.parallel else 1, unique=True)

    @cached_property
    def arguments(self) -> SearchStrategy[dict[str, Any]]:
        return _objects(self.text)

    @cached_property
    def results(self) -> TextStrategy:
        return _results(self.text, self.arguments)

    @cached_property
    def tool_lists(self) -> SearchStrategy[list[dict[str, Any]]]:
        return st.lists(_tools(self.text), min_size=1, max_size=3, unique_by=_name_of)


@dataclass
class _Writer:
    """One row in the making."""

    draw: st.DrawFn
    plan: _Plan
    tool_names: list[str]
    messages: list[Message] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def system(self) -> None:
        self.messages.append(_message("system", self.content()))

    def users(self, *, required: bool) -> None:
        """Write what one turn of the user is: one message, or any order of user and system messages."""
        if self.plan.alternating:
            self.messages.append(_message("user", self.content()))
            return
        first = not self.messages
        roles = self.draw(st.lists(st.sampled_from(("user", "system")), min_size=1, max_size=3))
        if first and not required and self.draw(st.booleans()):
            return
        for index, role in enumerate(roles):
            # an assistant or tool message may not be followed by a system message
            system = role == "system" and self.plan.system is not False and (index > 0 or first)
            self.messages.append(_message("system" if system else "user", self.content()))

    def tool_round(self, *, last: bool) -> bool:
        """Write an assistant's tool calls and their results; return whether the row ends with the calls."""
        ids = self.draw(self.plan.call_ids)
        calls = [self.call(call_id) for call_id in ids]
        message: Message = {"role": "assistant", "tool_calls": calls}
        if (content := self.draw(st.sampled_from(("absent", "", None)))) != "absent":
            message["content"] = content
        self.messages.append(self.weighed(message))
        if last and self.draw(st.booleans()):
            return True
        names = {call["id"]: call["function"]["name"] for call in calls}
        for call_id in self.draw(st.permutations(ids)):
            name = names[call_id] if self.draw(st.booleans()) else None
            self.messages.append(_tool_message(self.draw(self.plan.results), call_id, name))
        return False

    def call(self, call_id: str) -> dict[str, Any]:
        """Draw one tool call, its arguments as an object or as its JSON, with or without escapes."""
        arguments: Any = self.draw(self.plan.arguments)
        if self.draw(st.booleans()):
            arguments = json.dumps(arguments, ensure_ascii=self.draw(st.booleans()))
        function = {"name": self.draw(st.sampled_from(self.tool_names)), "arguments": arguments}
        return {"id": call_id, "type": "function", "function": function}

    def answer(self) -> None:
        count = 1 if self.plan.alternating else self.draw(st.integers(1, 2))
        for _ in range(count):
            self.messages.append(self.weighed(_message("assistant", self.content(speaks=True))))

    def weighed(self, message: Message) -> Message:
        weight = self.draw(self.plan.weight)
        return message if weight is None else message | {"weight": weight}

    def content(self, *, speaks: bool = False) -> Any:
        """Draw a content; one that `speaks` is more than spaces."""
        text = st.one_of(self.plan.text, st.sampled_from(self.said)) if self.said else self.plan.text
        contents: SearchStrategy[Any] = text
        if not self.plan.alternating:
            contents = st.one_of(text, st.lists(st.builds(_chunk, text), min_size=1, max_size=3))
        content = self.draw(contents.filter(_speaks) if speaks else contents)
        self.said.append(text_of(content))
        return content


@st.composite
def _rows(draw: st.DrawFn, plan: _Plan) -> dict[str, Any]:
    tools = draw(plan.tool_lists) if plan.tools else []
    writer = _Writer(draw, plan, [_name_of(tool) for tool in tools])
    if plan.system or (plan.system is None and draw(st.booleans())):
        writer.system()
    turns = draw(st.integers(1, plan.max_turns))
    calling = draw(st.integers(0, turns - 1))
    for turn in range(turns):
        # mistral-common leaves the first message out when it pairs tool calls and results, so a call never comes first
        writer.users(required=plan.tools or turn == turns - 1)
        last = turn == turns - 1
        rounds = draw(st.integers(int(turn == calling), 2)) if plan.tools else 0
        ended = [writer.tool_round(last=last and n == rounds - 1) for n in range(rounds)]
        if not any(ended):
            writer.answer()
    return {"messages": writer.messages} | ({"tools": tools} if tools else {})


def _any_text() -> TextStrategy:
    return st.one_of(plain_text(), hostile_text())


def _speaks(content: Any) -> bool:
    return bool(text_of(content).strip(" "))


def _messages_of(row: dict[str, Any]) -> list[Message]:
    return list(row["messages"])


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}


def _chunk(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _tool_message(content: str, call_id: str, name: str | None) -> Message:
    return {"role": "tool", "content": content, "tool_call_id": call_id} | ({"name": name} if name else {})


def _ids() -> TextStrategy:
    return st.text("0123456789" + string.ascii_letters, min_size=9, max_size=9)


def _names() -> TextStrategy:
    return st.text(_WORDS, min_size=1, max_size=12)


def _objects(text: TextStrategy) -> SearchStrategy[dict[str, Any]]:
    leaves = text | _SCALARS
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=2) | _dicts(inner), max_leaves=4)
    return _dicts(values)


def _dicts(values: SearchStrategy[Any]) -> SearchStrategy[dict[str, Any]]:
    return st.dictionaries(_names(), values, max_size=3)


def _results(text: TextStrategy, objects: SearchStrategy[dict[str, Any]]) -> TextStrategy:
    numbers = st.integers(-(10**6), 10**6).map(str) | st.sampled_from(("0.50", "1e3", "-0"))
    as_json = st.builds(json.dumps, objects, ensure_ascii=st.booleans())
    return st.one_of(text, numbers, as_json)


def _tools(text: TextStrategy) -> SearchStrategy[dict[str, Any]]:
    kinds = st.sampled_from(("string", "integer", "number", "boolean"))
    properties = st.dictionaries(_names(), st.fixed_dictionaries({"type": kinds, "description": text}), max_size=2)
    return st.builds(_tool, _names(), text, properties)


def _tool(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def _name_of(tool: dict[str, Any]) -> str:
    return str(tool["function"]["name"])
