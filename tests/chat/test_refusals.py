from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from each_oracle import oracle_named

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import EXIT_BAD_INPUT, OracleRejection
from pytest_mistral_lora.places import Place

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


def call(call_id: str | None = "abcdefgh1", name: str = "f") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": {}}}


def calls(*made: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": list(made or (call(),)), **fields}


def result(call_id: str | None = "abcdefgh1", **fields: Any) -> dict[str, Any]:
    return {"role": "tool", "content": "r", "tool_call_id": call_id, **fields}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "parameters": {}, **function}}


ALL = tuple(sorted(SHIPPED))
V2_UP = ALL[1:]
V3_UP = ALL[2:]
V7 = ("spm-v7", "spm-v7m1")
BEFORE_V7 = tuple(name for name in ALL if name not in V7)
WITH_TOOLS_BEFORE_V7 = tuple(name for name in BEFORE_V7 if name != "spm-v1")
Messages = list[dict[str, Any]]

REFUSED: list[tuple[tuple[str, ...], Messages, str, tuple[str, ...]]] = [
    (
        V3_UP,
        [USER, calls(call("short")), result("short"), ANSWER],
        "messages[1].tool_calls[0].id",
        ("'short'", "9 letters or digits", "mistral-lora import"),
    ),
    (
        V3_UP,
        [USER, calls(call(), call("line\nbreak")), result(), result("abcdefgh2"), ANSWER],
        "messages[1].tool_calls[1].id",
        ("'line\\nbreak'", "9 letters or digits"),
    ),
    (
        V3_UP,
        [USER, calls(call("")), result(), ANSWER],
        "messages[1].tool_calls[0].id",
        ("''", "9 letters or digits"),
    ),
    (
        V3_UP,
        [USER, calls(), result("short"), ANSWER],
        "messages[2].tool_call_id",
        ("'short'", "9 letters or digits"),
    ),
    (
        V3_UP,
        [USER, calls(call(None)), result(), ANSWER],
        "messages[1].tool_calls[0].id",
        ("no tool-call id", "9 letters or digits"),
    ),
    (
        V3_UP,
        [USER, calls(call("null")), result(), ANSWER],
        "messages[1].tool_calls[0].id",
        ("no tool-call id", "9 letters or digits"),
    ),
    (
        V3_UP,
        [USER, calls(), result(None), ANSWER],
        "messages[2].tool_call_id",
        ("no tool-call id", "9 letters or digits"),
    ),
    (ALL, [USER, ANSWER, SYSTEM, ANSWER], "messages[2].role", ("'system'", "after role 'assistant'")),
    (ALL, [USER, ANSWER, USER, result(), ANSWER], "messages[3].role", ("'tool'", "after role 'user'")),
    (ALL, [USER, ANSWER, USER], "messages[2].role", ("ends with role 'user'",)),
    (ALL, [ANSWER], "messages", ("only an assistant message",)),
    (BEFORE_V7, [USER, calls(content="x"), result(), ANSWER], "messages[1]", ("both content and tool calls",)),
    (BEFORE_V7, [USER, ANSWER, USER, ANSWER | {"content": ""}], "messages[3]", ("empty",)),
    (V7, [USER, ANSWER | {"content": ""}], "messages[1]", ("empty",)),
    (WITH_TOOLS_BEFORE_V7, [USER, ANSWER, calls()], "messages[2]", ("consecutive", "from v7 on")),
    (WITH_TOOLS_BEFORE_V7, [USER, calls(), result(), ANSWER, calls()], "messages[4]", ("consecutive", "from v7 on")),
    (
        ALL,
        [USER, calls(call(name="bad name")), result(), ANSWER],
        "messages[1].tool_calls[0].function.name",
        ("'bad name'", "1 to 64"),
    ),
    (ALL, [USER, calls(), result(name="bad name"), ANSWER], "messages[2].name", ("'bad name'", "1 to 64")),
    (ALL, [USER, calls(), ANSWER], "messages[1]", ("do not pair up",)),
    (ALL, [USER, calls(), result(), result(), ANSWER], "messages[1]", ("do not pair up",)),
    (ALL, [USER, ANSWER, result(), ANSWER], "messages[2]", ("do not pair up",)),
    (("spm-v1",), [USER, calls(), result(), ANSWER], "messages[1]", ("tool messages", "from v2 on")),
]
CASES = [(name, messages, place, values) for names, messages, place, values in REFUSED for name in names]


def check_refusal(refusal: OracleRejection, version: str, place: str, *values: str) -> None:
    """Compare the place of a refusal, and look for values and for the version of its tokenizer in its text."""
    assert str(refusal.place) == place
    assert [value for value in (*values, version) if value not in str(refusal)] == []
    assert refusal.expected


@pytest.mark.parametrize(("name", "messages", "place", "values"), CASES)
def test_a_refusal_names_the_field_the_reason_and_the_tokenizer(
    oracle_of: Callable[[str], Oracle], name: str, messages: Messages, place: str, values: tuple[str, ...]
) -> None:
    oracle = oracle_of(name)
    with pytest.raises(OracleRejection) as caught:
        oracle.encode({"messages": messages})
    check_refusal(caught.value, f"(tokenizer {oracle.version})", place, *values)
    assert caught.value.exit_code == EXIT_BAD_INPUT


ACCEPTED: list[tuple[tuple[str, ...], Messages]] = [
    (("spm-v2",), [USER, calls(call("short")), result("other"), ANSWER]),
    (V2_UP, [USER, calls(call(None))]),
    (V2_UP, [USER, calls(call("null"))]),
    (V7, [USER, calls(content="x"), result(), ANSWER]),
    (V7, [USER, ANSWER, calls()]),
    (V3_UP, [USER, calls(call(), call("abcdefgh2")), result(), result("abcdefgh2"), ANSWER]),
    (ALL, [USER, SYSTEM, ANSWER, ANSWER]),
]


@pytest.mark.parametrize(("name", "messages"), [(name, messages) for names, messages in ACCEPTED for name in names])
def test_the_neighbours_of_refused_rows_are_accepted(
    oracle_of: Callable[[str], Oracle], name: str, messages: Messages
) -> None:
    assert oracle_of(name).encode({"messages": messages}).supervised_tokens > 0


def test_several_results_of_one_turn_are_refused_by_v2(oracle_of: Callable[[str], Oracle]) -> None:
    row = {"messages": [USER, calls(call(), call("abcdefgh2")), result(), result("abcdefgh2"), ANSWER]}
    with pytest.raises(OracleRejection) as caught:
        oracle_of("spm-v2").encode(row)
    check_refusal(caught.value, "(tokenizer v2)", "messages[1]", "several tool results", "from v3 on")


def test_v1_refuses_tools_that_mistral_common_would_leave_out(oracle_of: Callable[[str], Oracle]) -> None:
    with pytest.raises(OracleRejection) as caught:
        oracle_of("spm-v1").encode({"messages": [USER, ANSWER], "tools": [tool()]})
    check_refusal(caught.value, "tokenizer v1", "tools", "no tools", "from v2 on")


@pytest.mark.parametrize(
    ("tools", "place", "values"),
    [
        ([tool(), tool(name="bad name")], "tools[1].function.name", ("'bad name'", "1 to 64")),
        ([tool(name="")], "tools[0].function.name", ("''", "1 to 64")),
        ([tool(parameters={"type": 3})], "tools", ("3 is not valid", "JSON Schema draft 7")),
    ],
)
def test_a_refused_tool_is_named(
    oracle_with_tools: Oracle, tools: Messages, place: str, values: tuple[str, ...]
) -> None:
    with pytest.raises(OracleRejection) as caught:
        oracle_with_tools.encode({"messages": [USER, ANSWER], "tools": tools})
    check_refusal(caught.value, f"(tokenizer {oracle_with_tools.version})", place, *values)


@pytest.mark.parametrize(
    ("messages", "place", "reason"),
    [
        ([USER, ANSWER, ANSWER | {"weight": 0}], "messages[1].role", "follows another assistant message"),
        ([ANSWER], "messages", "nothing comes before"),
    ],
)
def test_a_row_whose_last_answer_has_no_prompt_is_refused_as_a_prompt(
    oracle: Oracle, messages: Messages, place: str, reason: str
) -> None:
    with pytest.raises(OracleRejection) as caught:
        oracle.encode_prompt({"messages": messages})
    check_refusal(caught.value, f"(tokenizer {oracle.version})", place, reason)


def test_a_row_without_an_answer_is_a_prompt_as_a_whole(oracle: Oracle) -> None:
    prompt = Row((USER,))
    assert oracle.encode_prompt(prompt) == oracle.encode_prompt({"messages": [USER, ANSWER]})
    with pytest.raises(OracleRejection, match="nothing comes before"):
        oracle.encode_prompt(Row(()))


def test_a_prompt_with_a_call_that_has_no_id_is_refused(oracle_of: Callable[[str], Oracle]) -> None:
    row = {"messages": [USER, calls(call("null")), result(), ANSWER]}
    with pytest.raises(OracleRejection) as caught:
        oracle_of("spm-v3").encode_prompt(row)
    check_refusal(caught.value, "(tokenizer v3)", "messages[1].tool_calls[0].id", "no tool-call id")


@pytest.mark.parametrize(
    ("messages", "place", "values"),
    [
        (
            [USER, calls(call("abcdefgh1"), call("abcdefgh1")), result(), ANSWER],
            "messages[1].tool_calls[0].id",
            ("Duplicate", "abcdefgh1"),
        ),
        ([USER, calls(), result("abcdefgh2"), ANSWER], "messages[2].tool_call_id", ("Unexpected", "abcdefgh2")),
    ],
)
def test_newer_versions_pair_results_by_id(
    newer_oracle: Oracle, messages: Messages, place: str, values: tuple[str, ...]
) -> None:
    with pytest.raises(OracleRejection) as caught:
        newer_oracle.encode({"messages": messages})
    check_refusal(caught.value, f"(tokenizer {newer_oracle.version})", place, *values)


def test_v13_needs_an_id_for_each_call(newer_oracle: Oracle) -> None:
    row = {"messages": [USER, calls(call(None))]}
    if newer_oracle.version == "v11":
        assert newer_oracle.encode(row).supervised_tokens > 0
        return
    with pytest.raises(OracleRejection) as caught:
        newer_oracle.encode(row)
    place = "messages[1].tool_calls[0].id"
    check_refusal(caught.value, f"(tokenizer {newer_oracle.version})", place, "no tool-call id", "non-empty")


THOUGHT = {"role": "assistant", "content": [{"type": "thinking", "thinking": "b"}, {"type": "text", "text": "c"}]}


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [
        ("spm-v3", "v3", "role 'assistant'"),
        ("spm-v7", "v7", "role 'assistant'"),
        ("derived-v11", "v11", "no tokens"),
        ("derived-v13", "v13", "no tokens"),
    ],
)
def test_versions_without_thinking_refuse_it(name: str, version: str, found: str) -> None:
    oracle = oracle_named(name)
    with pytest.raises(OracleRejection) as caught:
        oracle.encode({"messages": [USER, THOUGHT]})
    check_refusal(caught.value, f"(tokenizer {version})", "messages[1].content", "thinking", found, "from v13 on")


def test_v15_refuses_a_system_prompt_that_thinks() -> None:
    row = {"messages": [THOUGHT | {"role": "system"}, USER, ANSWER]}
    assert oracle_named("derived-v13-thinking").encode(row).supervised_tokens == 2
    with pytest.raises(OracleRejection) as caught:
        oracle_named("derived-v15").encode(row)
    check_refusal(caught.value, "(tokenizer v15)", "messages[0].content", "thinking", "role 'system'")


@pytest.mark.parametrize(
    ("name", "version", "effort", "found"),
    [
        ("spm-v3", "v3", "low", "a model setting"),
        ("derived-v13", "v13", "low", "a model setting"),
        ("derived-v15", "v15", "max", "'max' is not a reasoning effort of this model"),
        ("derived-v15", "v15", "much", "not a reasoning effort (tokenizer v15)"),
    ],
)
def test_a_reasoning_effort_that_cannot_be_set_is_refused(name: str, version: str, effort: str, found: str) -> None:
    oracle = oracle_named(name)
    with pytest.raises(OracleRejection) as caught:
        oracle.encode({"messages": [USER, ANSWER], "reasoning_effort": effort})
    check_refusal(caught.value, f"(tokenizer {version})", "reasoning_effort", found)


def test_a_reason_that_is_not_known_is_passed_on(oracle_of: Callable[[str], Oracle]) -> None:
    row = parse_row({"messages": [USER, calls(), result(content="1" * 5000), ANSWER]}, place=Place.of("data.jsonl", 3))
    with pytest.raises(OracleRejection) as caught:
        oracle_of("spm-v3").encode(row)
    assert str(caught.value.place) == "data.jsonl:3"
    assert "(tokenizer v3)" in caught.value.found
    assert "Exceeds the limit (4300 digits)" in caught.value.found


def test_a_refusal_of_a_row_from_a_file_names_the_line(oracle_of: Callable[[str], Oracle]) -> None:
    row = parse_row({"messages": [USER, ANSWER, USER]}, place=Place.of("data.jsonl", 17))
    with pytest.raises(OracleRejection) as caught:
        oracle_of("spm-v7").encode(row)
    check_refusal(caught.value, "(tokenizer v7)", "data.jsonl:17, messages[2].role", "'user'")
