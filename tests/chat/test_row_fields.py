"""Every field of a row: what is refused, by field and value, and what is kept as it is."""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.errors import EXIT_BAD_INPUT, RowError
from pytest_mistral_lora.places import Place

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, ANSWER]}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": {}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def with_message(message: Any) -> dict[str, Any]:
    return {"messages": [USER, message, ANSWER]}


def with_user(content: Any) -> dict[str, Any]:
    return with_message({"role": "user", "content": content})


def with_call(**changed: Any) -> dict[str, Any]:
    return with_message({"role": "assistant", "tool_calls": [CALL | changed]})


def with_function(**changed: Any) -> dict[str, Any]:
    return with_call(function=CALL["function"] | changed)


def with_tool(tool: Any) -> dict[str, Any]:
    return GOOD | {"tools": [TOOL, tool]}


def tool_function(**changed: Any) -> dict[str, Any]:
    return {"type": "function", "function": TOOL["function"] | changed}


REFUSED: list[tuple[Any, str, tuple[str, ...]]] = [
    ([1], "", ("is a list", '"messages"')),
    ("x", "", ("is a string", '"messages"')),
    (None, "", ("is null", '"messages"')),
    (1.5, "", ("is a number", '"messages"')),
    ({}, "", ('no "messages"',)),
    ({"messages": None}, "", ('no "messages"',)),
    ({"messages": "x"}, "", ("is a string",)),
    ({"messages": USER}, "", ("is an object",)),
    ({"messages": []}, "", ("is empty",)),
    ({"messages": [USER]}, "messages", ("no assistant message",)),
    (GOOD | {"message": []}, "", ("'message'", "'messages'")),
    (GOOD | {"Messages": []}, "", ("'Messages'", "'messages'")),
    (GOOD | {"tool": []}, "", ("'tool'", "'tools'")),
    (GOOD | {1: 2}, "", ("the key 1",)),
    (with_message("x"), "messages[1]", ("is a string", '"role"', '"content"')),
    (with_message(["x"]), "messages[1]", ("is a list", '"role"', '"content"')),
    (with_message({"content": "x"}), "messages[1].role", ("is missing", "one of system, user, assistant, tool")),
    (
        with_message({"role": "bot"}),
        "messages[1].role",
        ("'bot'", "one of system, user, assistant, tool", "'assistant'"),
    ),
    (with_message({"role": None}), "messages[1].role", ("None", "one of system, user, assistant, tool")),
    (with_message({"role": ["user"]}), "messages[1].role", ("['user']", "one of system, user, assistant, tool")),
    (
        with_message(USER | {"weight": 0}),
        "messages[1].weight",
        ("unknown field", "'user'", "one of content, role"),
    ),
    (
        with_message(ANSWER | {"wieght": 0}),
        "messages[1].wieght",
        ("unknown field", "'assistant'", "one of content, role, tool_calls, weight"),
    ),
    (
        with_message({"role": "tool", "content": "x", "id": "y"}),
        "messages[1].id",
        ("unknown field", "'tool'", "one of content, name, role, tool_call_id", "--lossy message-keys"),
    ),
    (with_message({"role": "user"}), "messages[1].content", ("is missing",)),
    (with_message({"role": "assistant"}), "messages[1].content", ("is missing",)),
    (with_message({"role": "assistant", "tool_calls": []}), "messages[1].content", ("is missing",)),
    (with_user(None), "messages[1].content", ("is null",)),
    (with_user(5), "messages[1].content", ("is a number",)),
    (with_user(True), "messages[1].content", ("is a boolean",)),
    (with_user({"text": "x"}), "messages[1].content", ("is an object",)),
    (with_user(["x"]), "messages[1].content[0]", ("is a string",)),
    (with_user([{"text": "x"}]), "messages[1].content[0].type", ("is missing", "'text'")),
    (with_user([{"type": "hologram"}]), "messages[1].content[0].type", ("'hologram'", "'text'")),
    (with_user([{"type": ["text"]}]), "messages[1].content[0].type", ("['text']", "'text'")),
    (with_user([{"type": "text"}]), "messages[1].content[0].text", ("is null",)),
    (with_user([{"type": "text", "text": 1}]), "messages[1].content[0].text", ("is a number",)),
    (
        with_user([{"type": "text", "text": "x", "cache": 1}]),
        "messages[1].content[0].cache",
        ("unknown field", "type and text"),
    ),
    (
        with_user([{"type": "text", "text": "x", "thinking": None}]),
        "messages[1].content[0].thinking",
        ("unknown field", "type and text", "mistral-lora import FILE --to rows.jsonl"),
    ),
    *(
        (
            with_user([{"type": "text", "text": "x"}, {"type": kind}]),
            "messages[1].content[1]",
            (f"{name} chunk", f"'{kind}'", "text and images", "--lossy media"),
        )
        for kind, name in [
            ("audio", "audio"),
            ("input_audio", "audio"),
            ("audio_url", "audio"),
            ("video_url", "video"),
            ("file", "file"),
        ]
    ),
    (with_user([{"type": "image"}]), "messages[1].content[0].type", ("'image'", "'image_url'")),
    (with_user([{"type": "image_url"}]), "messages[1].content[0].image_url", ("is null", "a string")),
    (
        with_user([{"type": "image_url", "image_url": {"url": 1}}]),
        "messages[1].content[0].image_url.url",
        ("a number",),
    ),
    (
        with_user([{"type": "image_url", "image_url": "a.png", "width": 3}]),
        "messages[1].content[0]",
        ("width alone", "width and height"),
    ),
    (
        with_user([{"type": "image_url", "image_url": "a.png", "width": 3, "height": 0}]),
        "messages[1].content[0].height",
        ("0", "a number of pixels"),
    ),
    (
        with_message(ANSWER | {"content": [{"type": "image_url", "image_url": "a.png"}]}),
        "messages[1].content[0]",
        ("image_url chunk", "'assistant'", "the user"),
    ),
    (with_user([{"type": "image_url", "image_url": "a.png"}]), "messages[1].content[0]", ("a.png", "is not known")),
    (
        with_user([{"type": "thinking", "thinking": "x"}]),
        "messages[1].content[0]",
        ("thinking chunk", "'user'"),
    ),
    (
        with_message(ANSWER | {"content": [{"type": "thoughts"}]}),
        "messages[1].content[0].type",
        ("'thoughts'", "'text'", "'thinking'"),
    ),
    (
        with_message(ANSWER | {"content": [{"type": "thinking", "text": "x"}]}),
        "messages[1].content[0].text",
        ("unknown field", "type and thinking and closed"),
    ),
    (
        with_message(ANSWER | {"content": [{"type": "thinking"}]}),
        "messages[1].content[0].thinking",
        ("is null",),
    ),
    (
        with_message(ANSWER | {"content": [{"type": "thinking", "thinking": "x", "closed": 1}]}),
        "messages[1].content[0].closed",
        ("is a number", "true or false"),
    ),
    (GOOD | {"reasoning_effort": 3}, "reasoning_effort", ("is a number",)),
    (
        GOOD | {"reasoning_efort": "low"},
        "",
        ("'reasoning_efort'", "'reasoning_effort'"),
    ),
    (
        with_user("ab\ud800c"),
        "messages[1].content",
        ("'\\ud800'", "character 2"),
    ),
    (
        with_user([{"type": "text", "text": "\udfff"}]),
        "messages[1].content[0].text",
        ("'\\udfff'", "character 0"),
    ),
    *(
        (
            with_message(ANSWER | {"weight": weight}),
            "messages[1].weight",
            (f"weight: {weight!r};",),
        )
        for weight in (2, -1, 0.5, True, False, "1", [1], float("nan"))
    ),
    (with_message({"role": "tool", "content": "x", "name": 1}), "messages[1].name", ("is a number",)),
    (
        with_message({"role": "tool", "content": "x", "tool_call_id": 1}),
        "messages[1].tool_call_id",
        ("is a number",),
    ),
    (with_message({"role": "assistant", "tool_calls": "x"}), "messages[1].tool_calls", ("is a string",)),
    (with_message({"role": "assistant", "tool_calls": CALL}), "messages[1].tool_calls", ("is an object",)),
    (
        with_message({"role": "assistant", "tool_calls": [1]}),
        "messages[1].tool_calls[0]",
        ("is a number", '"id"', '"function"'),
    ),
    (with_call(index=0), "messages[1].tool_calls[0].index", ("unknown field", "one of function, id, type")),
    (with_call(id=7), "messages[1].tool_calls[0].id", ("is a number",)),
    (with_call(type="code"), "messages[1].tool_calls[0].type", ("'code'", "'function'")),
    (with_call(function=None), "messages[1].tool_calls[0].function", ("is null",)),
    (with_function(name=None), "messages[1].tool_calls[0].function.name", ("is null",)),
    (
        with_function(parameters={}),
        "messages[1].tool_calls[0].function.parameters",
        ("unknown field", "one of arguments, name"),
    ),
    (
        with_function(arguments=[1]),
        "messages[1].tool_calls[0].function.arguments",
        ("is a list",),
    ),
    (
        with_call(function={"name": "f"}),
        "messages[1].tool_calls[0].function.arguments",
        ("is missing",),
    ),
    (
        with_function(arguments="\ud800"),
        "messages[1].tool_calls[0].function.arguments",
        ("'\\ud800'", "character 0"),
    ),
    (
        GOOD | {"tools": "x"},
        "tools",
        ("is a string", "mistral-lora import FILE --to rows.jsonl"),
    ),
    (GOOD | {"tools": TOOL}, "tools", ("is an object",)),
    (with_tool("x"), "tools[1]", ("is a string", '"type"', '"function"')),
    (with_tool(TOOL["function"]), "tools[1].name", ("unknown field", "one of function, type")),
    (with_tool({"type": "code", "function": {}}), "tools[1].type", ("'code'", "'function'")),
    (with_tool({"type": "function"}), "tools[1].function", ("is null",)),
    (
        with_tool({"type": "function", "function": {"parameters": {}}}),
        "tools[1].function.name",
        ("is null",),
    ),
    (
        with_tool(tool_function(returns={})),
        "tools[1].function.returns",
        ("unknown field", "one of description, name, parameters, strict"),
    ),
    (
        with_tool(tool_function(parameters=None)),
        "tools[1].function.parameters",
        ("is null",),
    ),
    (with_tool(tool_function(description=[1])), "tools[1].function.description", ("is a list",)),
    (with_tool(tool_function(strict=1.5)), "tools[1].function.strict", ("is a number", "true or false")),
    # a null is harmless, and a name that no file can hold is not
    (
        with_message(USER | {"\ud800": None}),
        "messages[1].\\ud800",
        ("unknown field", "'user'", "one of content, role", "--lossy message-keys"),
    ),
    (
        with_call(**{"\udfff": None}),
        "messages[1].tool_calls[0].\\udfff",
        ("unknown field", "one of function, id, type"),
    ),
    (
        with_tool(tool_function(parameters=[])),
        "tools[1].function.parameters",
        ("is a list",),
    ),
]


@pytest.mark.parametrize(("data", "place", "values"), REFUSED, ids=range(len(REFUSED)))
def test_a_refused_row_names_the_field_and_the_value(data: Any, place: str, values: tuple[str, ...]) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(data)
    assert str(caught.value.place) == place
    assert [value for value in values if value not in str(caught.value)] == []
    assert caught.value.exit_code == EXIT_BAD_INPUT


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (with_function(arguments={"x": float("inf")}), r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"),
        (with_function(arguments={"x": "\ud800"}), r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"),
        (with_function(arguments={"x": {1}}), r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"),
        (with_tool(tool_function(description="\ud800")), r"tools\[1\]"),
        (with_tool(tool_function(parameters={"minimum": float("nan")})), r"tools\[1\]"),
    ],
)
def test_what_cannot_be_written_as_json_is_refused(data: Any, field: str) -> None:
    with pytest.raises(RowError, match=rf"^{field}: cannot be written as JSON: "):
        parse_row(data)


@pytest.mark.parametrize(("data", "place", "values"), REFUSED[:1] + REFUSED[7:10] + REFUSED[14:17])
def test_a_refused_row_of_a_file_names_the_line_first(data: Any, place: str, values: tuple[str, ...]) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(data, place=Place.of("data.jsonl", 17))
    assert str(caught.value).startswith(f"data.jsonl:17, {place}: " if place else "data.jsonl:17: ")
    assert values[0] in caught.value.found


ACCEPTED: list[Any] = [
    GOOD,
    GOOD | {"id": 7, "source": "web", "meta": {"a": 1}, "text": "x"},
    GOOD | {"tools": None},
    GOOD | {"tools": []},
    GOOD | {"tools": [TOOL]},
    with_user(""),
    with_user([]),
    with_user([{"type": "text", "text": ""}]),
    with_message(USER | {"weight": None, "name": None}),
    with_message(ANSWER | {"weight": 0}),
    with_message(ANSWER | {"weight": 1.0}),
    with_message({"role": "assistant", "content": None, "tool_calls": [CALL]}),
    with_message({"role": "assistant", "tool_calls": [CALL | {"index": None}]}),
    with_call(id=None),
    with_function(arguments=None),
    with_function(arguments='{"a": 1}'),
    with_function(arguments="not JSON"),
    with_tool(tool_function(description=None, strict=True)),
    MappingProxyType(GOOD),
    {"messages": (USER, ANSWER)},
]


@pytest.mark.parametrize("data", ACCEPTED, ids=range(len(ACCEPTED)))
def test_a_row_is_kept_as_it_is(data: Any) -> None:
    before = copy.deepcopy(dict(data))
    row = parse_row(data, place=Place.of("x", 1))
    assert list(row.messages) == list(data["messages"])
    assert list(row.tools or []) == list(data.get("tools") or [])
    assert str(row.place) == "x:1"
    assert dict(data) == before


ATOMS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(("", "user", "text", "function", "x"))
KEYS = st.sampled_from(
    ("messages", "role", "content", "tool_calls", "weight", "tools", "type", "text", "function", "name", "arguments")
)
ANYTHING = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@given(data=ANYTHING)
def test_whatever_is_no_row_is_a_row_error(data: Any) -> None:
    with pytest.raises(RowError):
        parse_row(data)


@given(message=st.dictionaries(KEYS, ANYTHING, max_size=4), role=st.sampled_from(("user", "assistant", "tool")))
def test_a_message_is_kept_as_it_is_or_its_field_is_named(message: dict[str, Any], role: str) -> None:
    data = with_message(message | {"role": role})
    assert kept_or_place(data) in (data["messages"], "messages[1]")


def kept_or_place(data: dict[str, Any]) -> Any:
    try:
        return list(parse_row(data).messages)
    except RowError as error:
        return str(error.place)[: len("messages[1]")]
