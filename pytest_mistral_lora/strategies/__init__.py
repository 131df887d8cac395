"""Hypothesis strategies for chat rows: plain JSON data that Mistral's own validation accepts.

`rows()` is accepted by every tokenizer version, `tool_rows()` by every version from v2 on, `tool_rows(parallel=True)`
from v3 on. Every strategy shrinks to short ASCII.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pytest_mistral_lora.chat.fields import ROLES
from pytest_mistral_lora.chat.rows import text_of
from pytest_mistral_lora.strategies.texts import (
    CALL_IDS,
    CONTROL_LITERALS,
    NAMES,
    TextStrategy,
    any_arguments,
    any_result,
    any_tool,
    hostile_text,
    name_of,
    plain_text,
    text_chunk,
    tool_message,
)

__all__ = ["CONTROL_LITERALS", "conversations", "hostile_text", "messages", "plain_text", "rows", "tool_rows"]


Message = dict[str, Any]
_ANY_TEXT = st.one_of(plain_text(), hostile_text())


def rows(
    *,
    tools: bool | None = False,
    system: bool | None = None,
    weights: bool = False,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    alternating: bool = True,
    parallel: bool = False,
    thinking: bool = False,
    efforts: Sequence[str] = (),
) -> SearchStrategy[dict[str, Any]]:
    """Generate chat rows that every tokenizer version accepts, or every version with tools if they have tools.

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
        text: Texts of the messages; plain and hostile text by default. Any message but the first may also repeat an
            earlier one. Assistant messages keep to texts that are more than spaces.
        alternating: False for consecutive user and assistant messages, system messages wherever they are allowed,
            conversations without a leading user message, and contents given as text chunks.
        parallel: Whether an assistant turn may make several tool calls (from v3 on), answered in any order.
        thinking: Whether answers, and turns that call tools, may think (from v13 on, if the tokenizer has the
            tokens for it), also in thinking that is not closed.
        efforts: Values of a row's `reasoning_effort` (from v15 on); empty for none.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns is {max_turns}, and a row has at least 1 turn")
    said = _ANY_TEXT if text is None else text
    plans = [
        _Plan(choice, system, weights, max_turns, said, alternating, parallel, thinking, tuple(efforts))
        for choice in ((False, True) if tools is None else (tools,))
    ]
    return st.one_of(*map(_rows, plans))


def tool_rows(
    *,
    parallel: bool = False,
    system: bool | None = None,
    weights: bool = False,
    max_turns: int = 4,
    text: TextStrategy | None = None,
    alternating: bool = True,
    thinking: bool = False,
    efforts: Sequence[str] = (),
) -> SearchStrategy[dict[str, Any]]:
    """Generate chat rows with tools, tool calls and tool results; the arguments are as for `rows`.

    At least one assistant message calls a tool; a call at the end of a row may have no result. Arguments are an object,
    its JSON, JSON in JSON, or not JSON; results are JSON, numbers or text. Ids are 9 letters or digits.

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
        thinking=thinking,
        efforts=efforts,
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
    whole = rows(system=system, max_turns=max_turns, text=text, alternating=alternating)
    return whole.map(lambda row: list(row["messages"]))


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
        text: Texts of the messages; plain and hostile text by default.

    Raises:
        ValueError: If `role` is not a role.
    """
    if role is None:
        return st.one_of(*(messages(role=choice, text=text) for choice in ("user", "assistant", "system")))
    if role not in ROLES:
        raise ValueError(f"role is {role!r}, expected one of {', '.join(ROLES)}")
    content = _ANY_TEXT if text is None else text
    if role == "tool":
        return st.builds(tool_message, any_result(content), CALL_IDS, st.none() | NAMES)
    return st.builds(_message, st.just(role), content.filter(_speaks) if role == "assistant" else content)


@dataclass
class _Plan:
    """The arguments of `rows`, and the strategies that are built from them."""

    tools: bool
    system: bool | None
    weights: bool
    max_turns: int
    text: TextStrategy
    alternating: bool
    parallel: bool
    thinking: bool
    efforts: tuple[str, ...]
    weight: SearchStrategy[int | None] = field(init=False)
    call_ids: SearchStrategy[list[str]] = field(init=False)
    arguments: SearchStrategy[Any] = field(init=False)
    results: TextStrategy = field(init=False)
    thoughts: SearchStrategy[list[Message]] = field(init=False)
    settings: SearchStrategy[dict[str, str]] = field(init=False)
    tool_lists: SearchStrategy[list[dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        # each strategy is built once: building them anew for every draw takes most of the time
        self.weight = st.sampled_from((None, 1, 0)) if self.weights else st.none()
        self.call_ids = st.lists(CALL_IDS, min_size=1, max_size=3 if self.parallel else 1, unique=True)
        self.arguments = any_arguments(self.text)
        self.results = any_result(self.text)
        closed = st.sampled_from(({}, {"closed": True}, {"closed": False}))
        thought = st.builds(lambda text, closed: {"type": "thinking", "thinking": text, **closed}, self.text, closed)
        self.thoughts = st.lists(thought, min_size=1, max_size=2)
        efforts = {"reasoning_effort": st.sampled_from(self.efforts)} if self.efforts else {}
        self.settings = st.fixed_dictionaries({}, optional=efforts) if efforts else st.just({})
        self.tool_lists = st.lists(any_tool(self.text), min_size=1, max_size=3, unique_by=name_of)


@dataclass
class _Writer:
    """One row in the making."""

    draw: st.DrawFn
    plan: _Plan
    tool_names: list[str]
    messages: list[Message] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def users(self, *, required: bool) -> None:
        """Write one turn of the user: one message, or any order of user and system messages."""
        if self.plan.alternating:
            self.messages.append(_message("user", self.content()))
            return
        first = not self.messages
        roles = self.draw(st.lists(st.sampled_from(("user", "system")), min_size=1, max_size=3))
        if first and not required and self.draw(st.booleans()):
            return
        for index, role in enumerate(roles):
            # mistral-common refuses a system message after one of the assistant or of a tool
            system = role == "system" and self.plan.system is not False and (index > 0 or first)
            self.messages.append(_message("system" if system else "user", self.content()))

    def tool_round(self, *, last: bool) -> bool:
        """Write an assistant's tool calls and their results; return whether the row ends with the calls."""
        ids = self.draw(self.plan.call_ids)
        made: list[dict[str, Any]] = []
        for call_id in ids:
            name = self.draw(st.sampled_from(self.tool_names))
            function = {"name": name, "arguments": self.draw(self.plan.arguments)}
            made.append({"id": call_id, "type": "function", "function": function})
        message: Message = {"role": "assistant", "tool_calls": made}
        # three ways to write a call without a text
        if (content := self.draw(st.sampled_from(("absent", "", None)))) != "absent":
            message["content"] = content
        if self.plan.thinking and self.draw(st.booleans()):
            message["content"] = self.draw(self.plan.thoughts)
        self.messages.append(self.weighed(message))
        if last and self.draw(st.booleans()):
            return True
        names = {call["id"]: call["function"]["name"] for call in made}
        for call_id in self.draw(st.permutations(ids)):
            shown = names[call_id] if self.draw(st.booleans()) else None
            self.messages.append(tool_message(self.draw(self.plan.results), call_id, shown))
        return False

    def answer(self) -> None:
        for _ in range(1 if self.plan.alternating else self.draw(st.integers(1, 2))):
            content = self.content(speaks=True)
            if self.plan.thinking and self.draw(st.booleans()):
                content = self.draw(self.plan.thoughts) + (
                    [text_chunk(content)] if isinstance(content, str) else content
                )
            self.messages.append(self.weighed(_message("assistant", content)))

    def weighed(self, message: Message) -> Message:
        weight = self.draw(self.plan.weight)
        return message if weight is None else message | {"weight": weight}

    def content(self, *, speaks: bool = False) -> Any:
        """Draw a content; one that `speaks` is more than spaces."""
        text = st.one_of(self.plan.text, st.sampled_from(self.said)) if self.said else self.plan.text
        contents: SearchStrategy[Any] = text
        if not self.plan.alternating:
            contents = st.one_of(text, st.lists(st.builds(text_chunk, text), min_size=1, max_size=3))
        content = self.draw(contents.filter(_speaks) if speaks else contents)
        # a text that comes again is found at the wrong place by code that searches for it
        self.said.append(text_of(content))
        return content


@st.composite
def _rows(draw: st.DrawFn, plan: _Plan) -> dict[str, Any]:
    tools = draw(plan.tool_lists) if plan.tools else []
    writer = _Writer(draw, plan, [name_of(tool) for tool in tools])
    if plan.system or (plan.system is None and draw(st.booleans())):
        writer.messages.append(_message("system", writer.content()))
    turns = draw(st.integers(1, plan.max_turns))
    # one turn calls for certain; in the others no round may be drawn
    calling = draw(st.integers(0, turns - 1))
    for turn in range(turns):
        # mistral-common leaves the first message out when it pairs tool calls and results, so a call never comes first
        writer.users(required=plan.tools or turn == turns - 1)
        last = turn == turns - 1
        rounds = draw(st.integers(int(turn == calling), 2)) if plan.tools else 0
        ended = [writer.tool_round(last=last and n == rounds - 1) for n in range(rounds)]
        if not any(ended):
            writer.answer()
    return {"messages": writer.messages} | ({"tools": tools} if tools else {}) | draw(plan.settings)


def _speaks(content: Any) -> bool:
    return bool(text_of(content).strip(" "))


def _message(role: str, content: Any) -> Message:
    return {"role": role, "content": content}
