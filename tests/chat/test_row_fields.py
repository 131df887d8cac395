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
TEXT = "a string or a list of text chunks"


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


REFUSED: list[tuple[Any, str]] = [
    ([1], 'a row is a list; expected an object with "messages"'),
    ("x", 'a row is a string; expected an object with "messages"'),
    (None, 'a row is null; expected an object with "messages"'),
    (1.5, 'a row is a number; expected an object with "messages"'),
    ({}, 'no "messages"; expected a list under "messages"'),
    ({"messages": None}, 'no "messages"; expected a list under "messages"'),
    ({"messages": "x"}, "messages is a string; expected a list"),
    ({"messages": USER}, "messages is an object; expected a list"),
    ({"messages": []}, "messages is empty; expected at least one user and one assistant message"),
    ({"messages": [USER]}, "messages: no assistant message; expected a turn that can be trained on"),
    (GOOD | {"message": []}, "unknown key 'message'; expected 'messages', or a name unlike it"),
    (GOOD | {"Messages": []}, "unknown key 'Messages'; expected 'messages', or a name unlike it"),
    (GOOD | {"tool": []}, "unknown key 'tool'; expected 'tools', or a name unlike it"),
    (GOOD | {1: 2}, "the key 1 is not a string"),
    (with_message("x"), 'messages[1]: is a string; expected an object with "role" and "content"'),
    (with_message(["x"]), 'messages[1]: is a list; expected an object with "role" and "content"'),
    (with_message({"content": "x"}), "messages[1].role: is missing; expected one of system, user, assistant, tool"),
    (
        with_message({"role": "bot"}),
        "messages[1].role: 'bot'; expected one of system, user, assistant, tool. Did you mean 'assistant'?",
    ),
    (with_message({"role": None}), "messages[1].role: None; expected one of system, user, assistant, tool"),
    (with_message({"role": ["user"]}), "messages[1].role: ['user']; expected one of system, user, assistant, tool"),
    (
        with_message(USER | {"weight": 0}),
        "messages[1].weight: unknown field of a message with role 'user'; expected one of content, role. "
        "Only answers have a weight: leave it out.",
    ),
    (
        with_message(ANSWER | {"wieght": 0}),
        "messages[1].wieght: unknown field of a message with role 'assistant'; "
        "expected one of content, role, tool_calls, weight",
    ),
    (
        with_message({"role": "tool", "content": "x", "id": "y"}),
        "messages[1].id: unknown field of a message with role 'tool'; "
        "expected one of content, name, role, tool_call_id. "
        "To leave it out: mistral-lora import FILE --to rows.jsonl --lossy message-keys",
    ),
    (with_message({"role": "user"}), f"messages[1].content: is missing; expected {TEXT}"),
    (with_message({"role": "assistant"}), f"messages[1].content: is missing; expected {TEXT}"),
    (with_message({"role": "assistant", "tool_calls": []}), f"messages[1].content: is missing; expected {TEXT}"),
    (with_user(None), f"messages[1].content: is null; expected {TEXT}"),
    (with_user(5), f"messages[1].content: is a number; expected {TEXT}"),
    (with_user(True), f"messages[1].content: is a boolean; expected {TEXT}"),
    (with_user({"text": "x"}), f"messages[1].content: is an object; expected {TEXT}"),
    (with_user(["x"]), 'messages[1].content[0]: is a string; expected a chunk: {"type": "text", "text": …}'),
    (with_user([{"text": "x"}]), "messages[1].content[0].type: is missing; expected 'text'"),
    (with_user([{"type": "hologram"}]), "messages[1].content[0].type: 'hologram'; expected 'text'"),
    (with_user([{"type": ["text"]}]), "messages[1].content[0].type: ['text']; expected 'text'"),
    (with_user([{"type": "text"}]), "messages[1].content[0].text: is null; expected a string"),
    (with_user([{"type": "text", "text": 1}]), "messages[1].content[0].text: is a number; expected a string"),
    (
        with_user([{"type": "text", "text": "x", "cache": 1}]),
        "messages[1].content[0].cache: unknown field of a text chunk; expected type and text",
    ),
    (
        with_user([{"type": "text", "text": "x", "thinking": None}]),
        "messages[1].content[0].thinking: unknown field of a text chunk; expected type and text. "
        "To leave out fields of null: mistral-lora import FILE --to rows.jsonl",
    ),
    *(
        (
            with_user([{"type": "text", "text": "x"}, {"type": kind}]),
            f"messages[1].content[1]: {name} chunk (type '{kind}'); expected text only. "
            "This suite checks and trains text. "
            "To leave it out: mistral-lora import FILE --to rows.jsonl --lossy media",
        )
        for kind, name in [
            ("image", "image"),
            ("image_url", "image"),
            ("audio", "audio"),
            ("input_audio", "audio"),
            ("audio_url", "audio"),
            ("video_url", "video"),
            ("file", "file"),
        ]
    ),
    (
        with_user([{"type": "thinking", "thinking": "x"}]),
        "messages[1].content[0]: thinking chunk of a message with role 'user'; "
        "expected thinking of the assistant or the system",
    ),
    (
        with_message(ANSWER | {"content": [{"type": "thoughts"}]}),
        "messages[1].content[0].type: 'thoughts'; expected 'text' or 'thinking'",
    ),
    (
        with_message(ANSWER | {"content": [{"type": "thinking", "text": "x"}]}),
        "messages[1].content[0].text: unknown field of a thinking chunk; expected type and thinking and closed",
    ),
    (
        with_message(ANSWER | {"content": [{"type": "thinking"}]}),
        "messages[1].content[0].thinking: is null; expected a string",
    ),
    (
        with_message(ANSWER | {"content": [{"type": "thinking", "thinking": "x", "closed": 1}]}),
        "messages[1].content[0].closed: is a number; expected true or false",
    ),
    (GOOD | {"reasoning_effort": 3}, "reasoning_effort: is a number; expected a string"),
    (
        GOOD | {"reasoning_efort": "low"},
        "unknown key 'reasoning_efort'; expected 'reasoning_effort', or a name unlike it",
    ),
    (
        with_user("ab\ud800c"),
        "messages[1].content: lone surrogate '\\ud800' at character 2; expected text that UTF-8 can hold",
    ),
    (
        with_user([{"type": "text", "text": "\udfff"}]),
        "messages[1].content[0].text: lone surrogate '\\udfff' at character 0; expected text that UTF-8 can hold",
    ),
    *(
        (
            with_message(ANSWER | {"weight": weight}),
            f"messages[1].weight: {weight!r}; expected 0 (rendered, no loss) or 1 (trained on)",
        )
        for weight in (2, -1, 0.5, True, False, "1", [1], float("nan"))
    ),
    (with_message({"role": "tool", "content": "x", "name": 1}), "messages[1].name: is a number; expected a string"),
    (
        with_message({"role": "tool", "content": "x", "tool_call_id": 1}),
        "messages[1].tool_call_id: is a number; expected a string",
    ),
    (with_message({"role": "assistant", "tool_calls": "x"}), "messages[1].tool_calls: is a string; expected a list"),
    (with_message({"role": "assistant", "tool_calls": CALL}), "messages[1].tool_calls: is an object; expected a list"),
    (
        with_message({"role": "assistant", "tool_calls": [1]}),
        'messages[1].tool_calls[0]: is a number; expected an object with "id" and "function"',
    ),
    (with_call(index=0), "messages[1].tool_calls[0].index: unknown field; expected one of function, id, type"),
    (with_call(id=7), "messages[1].tool_calls[0].id: is a number; expected a string"),
    (with_call(type="code"), "messages[1].tool_calls[0].type: 'code'; expected 'function'"),
    (with_call(function=None), "messages[1].tool_calls[0].function: is null; expected an object with a name"),
    (with_function(name=None), "messages[1].tool_calls[0].function.name: is null; expected a string"),
    (
        with_function(parameters={}),
        "messages[1].tool_calls[0].function.parameters: unknown field; expected one of arguments, name",
    ),
    (
        with_function(arguments=[1]),
        "messages[1].tool_calls[0].function.arguments: is a list; expected an object, or its JSON as a string",
    ),
    (
        with_call(function={"name": "f"}),
        "messages[1].tool_calls[0].function.arguments: is missing; expected an object, or its JSON as a string",
    ),
    (
        with_function(arguments="\ud800"),
        "messages[1].tool_calls[0].function.arguments: lone surrogate '\\ud800' at character 0; "
        "expected text that UTF-8 can hold",
    ),
    (
        GOOD | {"tools": "x"},
        "tools: is a string; expected a list. To read its JSON: mistral-lora import FILE --to rows.jsonl",
    ),
    (GOOD | {"tools": TOOL}, "tools: is an object; expected a list"),
    (with_tool("x"), 'tools[1]: is a string; expected an object with "type" and "function"'),
    (with_tool(TOOL["function"]), "tools[1].name: unknown field; expected one of function, type"),
    (with_tool({"type": "code", "function": {}}), "tools[1].type: 'code'; expected 'function'"),
    (with_tool({"type": "function"}), "tools[1].function: is null; expected an object with a name"),
    (
        with_tool({"type": "function", "function": {"parameters": {}}}),
        "tools[1].function.name: is null; expected a string",
    ),
    (
        with_tool(tool_function(returns={})),
        "tools[1].function.returns: unknown field; expected one of description, name, parameters, strict",
    ),
    (
        with_tool(tool_function(parameters=None)),
        "tools[1].function.parameters: is null; expected a JSON Schema object",
    ),
    (with_tool(tool_function(description=[1])), "tools[1].function.description: is a list; expected a string"),
    (with_tool(tool_function(strict=1.5)), "tools[1].function.strict: is a number; expected true or false"),
    # a null is harmless, and a name that no file can hold is not
    (
        with_message(USER | {"\ud800": None}),
        "messages[1].\\ud800: unknown field of a message with role 'user'; expected one of content, role. "
        "To leave it out: mistral-lora import FILE --to rows.jsonl --lossy message-keys",
    ),
    (
        with_call(**{"\udfff": None}),
        "messages[1].tool_calls[0].\\udfff: unknown field; expected one of function, id, type",
    ),
    (
        with_tool(tool_function(parameters=[])),
        "tools[1].function.parameters: is a list; expected a JSON Schema object",
    ),
]


@pytest.mark.parametrize(("data", "said"), REFUSED, ids=range(len(REFUSED)))
def test_a_refused_row_names_the_field_and_the_value(data: Any, said: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(data)
    assert str(caught.value) == said
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


@pytest.mark.parametrize(("data", "said"), REFUSED[:1] + REFUSED[7:10] + REFUSED[14:17])
def test_a_refused_row_of_a_file_names_the_line_first(data: Any, said: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(data, place=Place.of("data.jsonl", 17))
    field, separator, rest = said.partition(": ")
    expected = (
        f"data.jsonl:17, {said}" if field.startswith("messages") and separator and rest else f"data.jsonl:17: {said}"
    )
    assert str(caught.value) == expected


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
