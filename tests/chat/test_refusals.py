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
NINE = (
    "expected 9 letters or digits (a-z, A-Z, 0-9). "
    "To give each call such an id: mistral-lora import FILE --to rows.jsonl"
)
ORDER = "expected a system or user message first, then user and assistant in turn, tool results after tool calls"
PAIRS = (
    "tool calls and tool results do not pair up (tokenizer VERSION); "
    "expected one tool message for each tool call, before the next assistant message"
)
BOTH = "the assistant message has both content and tool calls (tokenizer VERSION); expected either text or tool calls"
EMPTY = "the assistant message is empty (tokenizer VERSION); expected text or tool calls"
NAME = "(tokenizer VERSION); expected 1 to 64 letters, digits, underscores or dashes"
NO_TOOLS = (
    "tool messages, which tokenizer v1 does not have (tokenizer v1); "
    "expected a conversation without tools, or a tokenizer from v2 on"
)
ONE_TURN = (
    "consecutive assistant messages are one turn, and this one would have both text and tool calls "
    "(tokenizer VERSION); expected either text or tool calls, or a tokenizer from v7 on"
)
Messages = list[dict[str, Any]]

REFUSED: list[tuple[tuple[str, ...], Messages, str]] = [
    (
        V3_UP,
        [USER, calls(call("short")), result("short"), ANSWER],
        f"messages[1].tool_calls[0].id: tool-call id 'short' (tokenizer VERSION); {NINE}",
    ),
    (
        V3_UP,
        [USER, calls(call(), call("line\nbreak")), result(), result("abcdefgh2"), ANSWER],
        f"messages[1].tool_calls[1].id: tool-call id 'line\\nbreak' (tokenizer VERSION); {NINE}",
    ),
    (
        V3_UP,
        [USER, calls(call("")), result(), ANSWER],
        f"messages[1].tool_calls[0].id: tool-call id '' (tokenizer VERSION); {NINE}",
    ),
    (
        V3_UP,
        [USER, calls(), result("short"), ANSWER],
        f"messages[2].tool_call_id: tool-call id 'short' (tokenizer VERSION); {NINE}",
    ),
    (
        V3_UP,
        [USER, calls(call(None)), result(), ANSWER],
        f"messages[1].tool_calls[0].id: no tool-call id (tokenizer VERSION); {NINE}",
    ),
    (
        V3_UP,
        [USER, calls(call("null")), result(), ANSWER],
        f"messages[1].tool_calls[0].id: no tool-call id (tokenizer VERSION); {NINE}",
    ),
    (
        V3_UP,
        [USER, calls(), result(None), ANSWER],
        f"messages[2].tool_call_id: no tool-call id (tokenizer VERSION); {NINE}",
    ),
    (
        ALL,
        [USER, ANSWER, SYSTEM, ANSWER],
        f"messages[2].role: role 'system' straight after role 'assistant' (tokenizer VERSION); {ORDER}",
    ),
    (
        ALL,
        [USER, ANSWER, USER, result(), ANSWER],
        f"messages[3].role: role 'tool' straight after role 'user' (tokenizer VERSION); {ORDER}",
    ),
    (
        ALL,
        [USER, ANSWER, USER],
        "messages[2].role: the conversation ends with role 'user' (tokenizer VERSION); "
        "expected an assistant message last: a row is trained on the assistant's answer",
    ),
    (
        ALL,
        [ANSWER],
        "messages: the conversation has only an assistant message (tokenizer VERSION); "
        "expected a system or user message first",
    ),
    (BEFORE_V7, [USER, calls(content="x"), result(), ANSWER], f"messages[1]: {BOTH}"),
    (BEFORE_V7, [USER, ANSWER, USER, ANSWER | {"content": ""}], f"messages[3]: {EMPTY}"),
    (
        V7,
        [USER, ANSWER | {"content": ""}],
        "messages[1]: the assistant message is empty (tokenizer VERSION); expected text or tool calls",
    ),
    (WITH_TOOLS_BEFORE_V7, [USER, ANSWER, calls()], f"messages[2]: {ONE_TURN}"),
    (WITH_TOOLS_BEFORE_V7, [USER, calls(), result(), ANSWER, calls()], f"messages[4]: {ONE_TURN}"),
    (
        ALL,
        [USER, calls(call(name="bad name")), result(), ANSWER],
        f"messages[1].tool_calls[0].function.name: function name 'bad name' {NAME}",
    ),
    (ALL, [USER, calls(), result(name="bad name"), ANSWER], f"messages[2].name: function name 'bad name' {NAME}"),
    (ALL, [USER, calls(), ANSWER], f"messages[1]: {PAIRS}"),
    (ALL, [USER, calls(), result(), result(), ANSWER], f"messages[1]: {PAIRS}"),
    (ALL, [USER, ANSWER, result(), ANSWER], f"messages[2]: {PAIRS}"),
    (("spm-v1",), [USER, calls(), result(), ANSWER], f"messages[1]: {NO_TOOLS}"),
]
CASES = [(name, messages, said) for names, messages, said in REFUSED for name in names]


@pytest.mark.parametrize(("name", "messages", "said"), CASES)
def test_a_refusal_names_the_field_the_reason_and_the_tokenizer(
    oracle_of: Callable[[str], Oracle], name: str, messages: Messages, said: str
) -> None:
    oracle = oracle_of(name)
    with pytest.raises(OracleRejection) as caught:
        oracle.encode({"messages": messages})
    assert str(caught.value) == said.replace("VERSION", oracle.version)
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
    assert str(caught.value) == (
        "messages[1]: several tool results for one assistant turn (tokenizer v2); "
        "expected one tool result, or a tokenizer from v3 on"
    )


def test_v1_refuses_tools_that_mistral_common_would_leave_out(oracle_of: Callable[[str], Oracle]) -> None:
    with pytest.raises(OracleRejection) as caught:
        oracle_of("spm-v1").encode({"messages": [USER, ANSWER], "tools": [tool()]})
    assert str(caught.value) == (
        "tools: tools are given, but tokenizer v1 has no tools: mistral-common would leave them out; "
        "expected a row without tools, or a tokenizer from v2 on"
    )


@pytest.mark.parametrize(
    ("tools", "said"),
    [
        ([tool(), tool(name="bad name")], f"tools[1].function.name: function name 'bad name' {NAME}"),
        ([tool(name="")], f"tools[0].function.name: function name '' {NAME}"),
        (
            [tool(parameters={"type": 3})],
            "tools: the parameters are not a JSON Schema: 3 is not valid under any of the given schemas "
            "(tokenizer VERSION); expected JSON Schema draft 7",
        ),
    ],
)
def test_a_refused_tool_is_named(oracle_with_tools: Oracle, tools: Messages, said: str) -> None:
    with pytest.raises(OracleRejection) as caught:
        oracle_with_tools.encode({"messages": [USER, ANSWER], "tools": tools})
    assert str(caught.value) == said.replace("VERSION", oracle_with_tools.version)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [USER, ANSWER, ANSWER | {"weight": 0}],
            "messages[1].role: the last assistant message follows another assistant message, so no prompt asks for it "
            "(tokenizer VERSION); expected a user or tool message before the last assistant message",
        ),
        (
            [ANSWER],
            "messages: nothing comes before the last assistant message, so no prompt asks for it (tokenizer VERSION); "
            "expected a system or user message first",
        ),
    ],
)
def test_a_row_whose_last_answer_has_no_prompt_is_refused_as_a_prompt(
    oracle: Oracle, messages: Messages, said: str
) -> None:
    with pytest.raises(OracleRejection) as caught:
        oracle.encode_prompt({"messages": messages})
    assert str(caught.value) == said.replace("VERSION", oracle.version)


def test_a_row_without_an_answer_is_a_prompt_as_a_whole(oracle: Oracle) -> None:
    prompt = Row((USER,))
    assert oracle.encode_prompt(prompt) == oracle.encode_prompt({"messages": [USER, ANSWER]})
    with pytest.raises(OracleRejection, match="nothing comes before"):
        oracle.encode_prompt(Row(()))


def test_a_prompt_with_a_call_that_has_no_id_is_refused(oracle_of: Callable[[str], Oracle]) -> None:
    row = {"messages": [USER, calls(call("null")), result(), ANSWER]}
    with pytest.raises(OracleRejection, match=r"^messages\[1\]\.tool_calls\[0\]\.id: no tool-call id \(tokenizer v3\)"):
        oracle_of("spm-v3").encode_prompt(row)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (
            [USER, calls(call("abcdefgh1"), call("abcdefgh1")), result(), ANSWER],
            "messages[1].tool_calls[0].id: Duplicate tool call id abcdefgh1 (tokenizer VERSION); "
            "expected each tool call answered once, by its id",
        ),
        (
            [USER, calls(), result("abcdefgh2"), ANSWER],
            "messages[2].tool_call_id: Unexpected tool call id abcdefgh2 (tokenizer VERSION); "
            "expected each tool call answered once, by its id",
        ),
    ],
)
def test_newer_versions_pair_results_by_id(newer_oracle: Oracle, messages: Messages, said: str) -> None:
    with pytest.raises(OracleRejection) as caught:
        newer_oracle.encode({"messages": messages})
    assert str(caught.value) == said.replace("VERSION", newer_oracle.version)


def test_v13_needs_an_id_for_each_call(newer_oracle: Oracle) -> None:
    row = {"messages": [USER, calls(call(None))]}
    if newer_oracle.version == "v11":
        assert newer_oracle.encode(row).supervised_tokens > 0
        return
    with pytest.raises(OracleRejection) as caught:
        newer_oracle.encode(row)
    assert str(caught.value) == (
        "messages[1].tool_calls[0].id: no tool-call id "
        f"(tokenizer {newer_oracle.version}); expected a non-empty tool-call id"
    )


THOUGHT = {"role": "assistant", "content": [{"type": "thinking", "thinking": "b"}, {"type": "text", "text": "c"}]}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("spm-v3", "messages[1].content: thinking in a message with role 'assistant' (tokenizer v3)"),
        ("spm-v7", "messages[1].content: thinking in a message with role 'assistant' (tokenizer v7)"),
        ("derived-v11", "messages[1].content: thinking, which this tokenizer has no tokens for (tokenizer v11)"),
        ("derived-v13", "messages[1].content: thinking, which this tokenizer has no tokens for (tokenizer v13)"),
    ],
)
def test_versions_without_thinking_refuse_it(name: str, found: str) -> None:
    oracle = oracle_named(name)
    with pytest.raises(OracleRejection) as caught:
        oracle.encode({"messages": [USER, THOUGHT]})
    assert str(caught.value).startswith(f"{found}; expected text only, or a tokenizer from v13 on")


def test_v15_refuses_a_system_prompt_that_thinks() -> None:
    row = {"messages": [THOUGHT | {"role": "system"}, USER, ANSWER]}
    assert oracle_named("derived-v13-thinking").encode(row).supervised_tokens == 2
    with pytest.raises(OracleRejection, match=r"^messages\[0\].content: thinking in a message with role 'system'"):
        oracle_named("derived-v15").encode(row)


@pytest.mark.parametrize(
    ("name", "effort", "found"),
    [
        ("spm-v3", "low", "a model setting, which this tokenizer does not have (tokenizer v3)"),
        ("derived-v13", "low", "a model setting, which this tokenizer does not have (tokenizer v13)"),
        ("derived-v15", "max", "'max' is not a reasoning effort of this model (tokenizer v15)"),
        ("derived-v15", "much", "not a reasoning effort (tokenizer v15)"),
    ],
)
def test_a_reasoning_effort_that_cannot_be_set_is_refused(name: str, effort: str, found: str) -> None:
    oracle = oracle_named(name)
    with pytest.raises(OracleRejection) as caught:
        oracle.encode({"messages": [USER, ANSWER], "reasoning_effort": effort})
    assert str(caught.value).startswith(f"reasoning_effort: {found}; expected ")


def test_a_reason_that_is_not_known_is_passed_on(oracle_of: Callable[[str], Oracle]) -> None:
    row = parse_row({"messages": [USER, calls(), result(content="1" * 5000), ANSWER]}, place=Place.of("data.jsonl", 3))
    with pytest.raises(OracleRejection) as caught:
        oracle_of("spm-v3").encode(row)
    assert str(caught.value).startswith(
        "data.jsonl:3: mistral-common refuses the conversation (tokenizer v3): Exceeds the limit (4300 digits)"
    )


def test_a_refusal_of_a_row_from_a_file_names_the_line(oracle_of: Callable[[str], Oracle]) -> None:
    row = parse_row({"messages": [USER, ANSWER, USER]}, place=Place.of("data.jsonl", 17))
    with pytest.raises(OracleRejection, match=r"^data\.jsonl:17, messages\[2\]\.role: the conversation ends with"):
        oracle_of("spm-v7").encode(row)
