"""A row during generation: its plan, and the order of drawing its messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pytest_mistral_lora.chat.chunks.thinking import THINKING
from pytest_mistral_lora.chat.rows import text_of
from pytest_mistral_lora.strategies.texts import (
    CALL_IDS,
    FREE_IDS,
    TextStrategy,
    any_arguments,
    any_format,
    any_result,
    any_tool,
    fits_tool,
    name_of,
    text_chunk,
    tool_message,
    values_by_kind,
)

Message = dict[str, Any]
T = TypeVar("T")

_TRIES = 3
"""Draws before a row is given up whose value does not fit: as many as `SearchStrategy.filter` makes."""
# a text that was said before comes as often as each of two kinds of new texts, and chunks as often as each kind of text
_REPEATS = st.sampled_from((False, False, True))
_IN_CHUNKS = st.sampled_from((False, False, False, True))
_ROLES = st.lists(st.sampled_from(("user", "system")), min_size=1, max_size=3)
_NO_TEXT = st.sampled_from(("absent", "", None))
"""Three ways to write a call without a text."""


@dataclass
class RowPlan:
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
    formats: bool
    result_chunks: bool
    any_ids: bool
    weight: SearchStrategy[int | None] = field(init=False)
    call_ids: SearchStrategy[list[str]] = field(init=False)
    arguments: SearchStrategy[Any] = field(init=False)
    values: dict[str, SearchStrategy[Any]] = field(init=False)
    results: SearchStrategy[Any] = field(init=False)
    thoughts: SearchStrategy[list[Message]] = field(init=False)
    settings: SearchStrategy[dict[str, Any]] = field(init=False)
    tool_lists: SearchStrategy[list[dict[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        # each strategy is built once: building them for every draw takes most of the time
        self.weight = st.sampled_from((None, 1, 0)) if self.weights else st.none()
        ids = CALL_IDS | FREE_IDS if self.any_ids else CALL_IDS
        self.call_ids = st.lists(ids, min_size=1, max_size=3 if self.parallel else 1, unique=True)
        self.arguments = any_arguments(self.text)
        self.values = values_by_kind(self.text)
        self.results = any_result(self.text)
        if self.result_chunks:
            self.results = self.results | st.lists(st.builds(text_chunk, self.results), min_size=1, max_size=3)
        closed = st.sampled_from(({}, {"closed": True}, {"closed": False}))
        thought = st.builds(lambda text, closed: {**THINKING.chunk(text), **closed}, self.text, closed)
        self.thoughts = st.lists(thought, min_size=1, max_size=2)
        settings: dict[str, SearchStrategy[Any]] = {}
        if self.efforts:
            settings["reasoning_effort"] = st.sampled_from(self.efforts)
        if self.formats:
            settings["response_format"] = any_format(self.text)
        self.settings = st.fixed_dictionaries({}, optional=settings) if settings else st.just({})
        self.tool_lists = st.lists(any_tool(self.text), min_size=1, max_size=3, unique_by=name_of)


@dataclass
class _Writer:
    """A row during generation."""

    draw: st.DrawFn
    plan: RowPlan
    tools: list[dict[str, Any]]
    messages: list[Message] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def users(self, *, required: bool) -> None:
        """Write one turn of the user: one message, or any order of user and system messages."""
        if self.plan.alternating:
            self.messages.append(message_of("user", self.content()))
            return
        first = not self.messages
        roles = self.draw(_ROLES)
        if first and not required and self.draw(st.booleans()):
            return
        for index, role in enumerate(roles):
            # mistral-common refuses a system message after a message of the assistant or of a tool
            system = role == "system" and self.plan.system is not False and (index > 0 or first)
            self.messages.append(message_of("system" if system else "user", self.content()))

    def tool_round(self, *, last: bool) -> bool:
        """Write an assistant's tool calls and their results; return whether the row ends with the calls."""
        ids = self.draw(self.plan.call_ids)
        made: list[dict[str, Any]] = []
        for call_id in ids:
            tool = self.one_of(self.tools)
            function = {"name": name_of(tool), "arguments": self.arguments(tool)}
            made.append({"id": call_id, "type": "function", "function": function})
        message: Message = {"role": "assistant", "tool_calls": made}
        if (content := self.draw(_NO_TEXT)) != "absent":
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

    def arguments(self, tool: dict[str, Any]) -> Any:
        """Draw arguments of any form that fit a tool; an object may have some of its parameters."""
        arguments = self.fitting(lambda: self.draw(self.plan.arguments), partial(fits_tool, tool=tool))
        if isinstance(arguments, dict):
            for name, parameter in tool["function"]["parameters"]["properties"].items():
                kinds = parameter["type"] if isinstance(parameter["type"], list) else [parameter["type"]]
                if self.draw(st.booleans()):
                    arguments[name] = self.draw(self.plan.values[self.one_of(kinds)])
        return arguments

    def answer(self) -> None:
        for _ in range(1 if self.plan.alternating else self.draw(st.integers(1, 2))):
            content = self.content(speaks=True)
            if self.plan.thinking and self.draw(st.booleans()):
                content = self.draw(self.plan.thoughts) + (
                    [text_chunk(content)] if isinstance(content, str) else content
                )
            self.messages.append(self.weighed(message_of("assistant", content)))

    def weighed(self, message: Message) -> Message:
        weight = self.draw(self.plan.weight)
        return message if weight is None else message | {"weight": weight}

    def content(self, *, speaks: bool = False) -> Any:
        """Draw a content; if it `speaks`, it is more than spaces."""
        content = self.fitting(self.any_content, is_spoken) if speaks else self.any_content()
        # code that searches for a repeated text finds it at the wrong place
        self.said.append(text_of(content))
        return content

    def any_content(self) -> Any:
        """Draw a text, or chunks of text."""
        if self.plan.alternating or not self.draw(_IN_CHUNKS):
            return self.text()
        return [text_chunk(self.text()) for _ in range(self.draw(st.integers(1, 3)))]

    def text(self) -> str:
        """Draw a text: a new one, or one that was said before."""
        repeats = bool(self.said) and self.draw(_REPEATS)
        return self.one_of(self.said) if repeats else self.draw(self.plan.text)

    # Hypothesis examines each new strategy, which takes as long as to draw from it: so none is made for a draw. It
    # keeps equal strategies of whole numbers.

    def one_of(self, values: Sequence[T]) -> T:
        """Draw one of some values."""
        return values[self.draw(st.integers(0, len(values) - 1))]

    def fitting(self, draw: Callable[[], T], fits: Callable[[T], bool]) -> T:
        """Draw a value that fits; if it takes too many draws, give up the row, as a filter does."""
        for _ in range(_TRIES):
            if fits(value := draw()):
                return value
        reject()


@st.composite
def written_rows(draw: st.DrawFn, plan: RowPlan) -> dict[str, Any]:
    """Generate rows of a plan."""
    tools = draw(plan.tool_lists) if plan.tools else []
    writer = _Writer(draw, plan, tools)
    if plan.system or (plan.system is None and draw(st.booleans())):
        writer.messages.append(message_of("system", writer.content()))
    turns = draw(st.integers(1, plan.max_turns))
    # one turn certainly calls; the others may draw no round
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


def is_spoken(content: Any) -> bool:
    """Return whether a content is more than spaces."""
    return bool(text_of(content).strip(" "))


def message_of(role: str, content: Any) -> Message:
    """Return a message."""
    return {"role": role, "content": content}
