from __future__ import annotations

import doctest
import json
import re
import string
from functools import cache
from typing import Any

import pytest
from derived_tekken import derived_oracle
from each_oracle import oracle_named
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from mistral_common.tokens.tokenizers.base import SpecialTokens

from pytest_mistral_lora import strategies
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.chat.objective import Objective
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import text_of
from pytest_mistral_lora.strategies import (
    CONTROL_LITERALS,
    conversations,
    hostile_text,
    messages,
    pairs,
    plain_text,
    rows,
    texts,
    tool_rows,
)
from pytest_mistral_lora.strategies import row_strategies as chats

each_by_several = settings(max_examples=15)
ONE_OF_EACH = ("spm-v1", "spm-v2", "spm-v3", "spm-v7", "tekken-240911")


@cache
def oracle_of(name: str) -> Oracle:
    return Oracle(shipped_tokenizer(name))


def found(strategy: st.SearchStrategy[Any], wanted: Any, *, shrink: bool = False, most: int = 2000) -> Any:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    return find(strategy, wanted, settings=settings(phases=phases, max_examples=most))


@pytest.mark.parametrize("alternating", [True, False])
@each_by_several
@given(data=st.data(), system=st.none() | st.booleans())
def test_every_version_accepts_rows(alternating: bool, data: st.DataObject, system: bool | None) -> None:
    row = data.draw(rows(system=system, weights=True, alternating=alternating))
    for name in ONE_OF_EACH:
        oracle_of(name).encode(row)


@pytest.mark.parametrize("alternating", [True, False])
@each_by_several
@given(data=st.data(), system=st.none() | st.booleans())
def test_every_version_from_v2_on_accepts_tool_rows(
    alternating: bool, data: st.DataObject, system: bool | None
) -> None:
    row = data.draw(tool_rows(system=system, alternating=alternating))
    for name in ONE_OF_EACH[1:]:
        oracle_of(name).encode(row)


@each_by_several
@given(row=tool_rows(parallel=True, weights=True, alternating=False))
def test_every_version_from_v3_on_accepts_parallel_calls(row: dict[str, Any]) -> None:
    for name in ONE_OF_EACH[2:]:
        oracle_of(name).encode(row)


@given(row=rows(tools=None, parallel=True, weights=True, alternating=False, thinking=True))
def test_versions_that_think_accept_thinking(row: dict[str, Any]) -> None:
    for name in ("derived-v13-thinking", "derived-v15"):
        derived_oracle(name).encode(row)


NEWEST = {"thinking": True, "efforts": ("none", "low", "high"), "formats": True, "any_ids": True, "result_chunks": True}


@given(row=rows(tools=None, parallel=True, **NEWEST))
def test_v15_accepts_reasoning_efforts_and_formats(row: dict[str, Any]) -> None:
    derived_oracle("derived-v15-schema").encode(row)


@given(row=tool_rows(any_ids=True, result_chunks=True))
def test_v13_accepts_any_id_and_results_in_chunks(row: dict[str, Any]) -> None:
    derived_oracle("derived-v13").encode(row)


@given(row=rows(tools=None, weights=True, alternating=False))
def test_rows_are_plain_json(row: dict[str, Any]) -> None:
    assert json.loads(json.dumps(row, allow_nan=False)) == row
    json.dumps(row, ensure_ascii=False).encode()


@given(row=rows(max_turns=2))
def test_alternating_rows_alternate(row: dict[str, Any]) -> None:
    roles = "".join(message["role"][0] for message in row["messages"])
    assert re.fullmatch("s?(ua){1,2}", roles)


@given(row=tool_rows())
def test_tool_rows_call_and_answer(row: dict[str, Any]) -> None:
    roles = "".join("c" if m.get("tool_calls") else m["role"][0] for m in row["messages"])
    assert re.fullmatch("s?(u(ct)*a)*(u(ct)*a|u(ct)*c)", roles)
    assert "c" in roles
    names = {tool["function"]["name"] for tool in row["tools"]}
    calls = [call for message in row["messages"] for call in message.get("tool_calls", ())]
    assert {call["function"]["name"] for call in calls} <= names
    assert all(re.fullmatch("[0-9A-Za-z]{9}", call["id"]) for call in calls)


@given(row=tool_rows(parallel=True))
def test_every_result_answers_a_call_before_it(row: dict[str, Any]) -> None:
    waiting: set[str] = set()
    for message in row["messages"]:
        if message["role"] == "tool":
            waiting.remove(message["tool_call_id"])
        else:
            assert not waiting
            waiting = {call["id"] for call in message.get("tool_calls", ())}


@given(row=rows(system=True, weights=False))
def test_options_are_kept(row: dict[str, Any]) -> None:
    assert row["messages"][0]["role"] == "system"
    assert "tools" not in row
    assert not any("weight" in message for message in row["messages"])


@given(row=rows(system=False, alternating=False))
def test_no_system_message_where_none_is_wanted(row: dict[str, Any]) -> None:
    assert "system" not in {message["role"] for message in row["messages"]}


@given(row=rows(tools=None, text=st.sampled_from(("a", "b"))))
def test_messages_say_what_they_are_given(row: dict[str, Any]) -> None:
    assert {m["content"] for m in row["messages"] if m["role"] in ("user", "system")} <= {"a", "b"}
    assert {tool["function"].get("description", "a") for tool in row.get("tools", ())} <= {"a", "b"}


@each_by_several
@given(data=st.data(), tools=st.booleans())
def test_every_version_accepts_both_sides_of_pairs_and_tells_them_apart(data: st.DataObject, tools: bool) -> None:
    sides = parse_rows(data.draw(pairs(tools=tools)))
    for name in ONE_OF_EACH[1:] if tools else ONE_OF_EACH:
        chosen, rejected = (oracle_of(name).encode(row) for row in sides)
        assert chosen.input_ids != rejected.input_ids


@given(text=plain_text())
def test_plain_text_is_plain(text: str) -> None:
    assert text
    assert text == text.strip()
    assert not holds_a_literal(text)


@given(text=hostile_text())
def test_hostile_text_can_be_written(text: str) -> None:
    assert text.encode().decode() == text


@given(conversation=conversations(max_turns=1))
def test_conversations_are_the_messages_of_rows(conversation: list[dict[str, Any]]) -> None:
    parse_row({"messages": conversation})
    assert [message["role"] for message in conversation if message["role"] != "system"] == ["user", "assistant"]


@pytest.mark.parametrize("role", [None, "system", "user", "assistant", "tool"])
@given(data=st.data())
def test_messages_are_of_the_role(role: str | None, data: st.DataObject) -> None:
    message = data.draw(messages(role=role))
    assert role is None or message["role"] == role
    parse_row({"messages": [message, {"role": "assistant", "content": "a"}]})


def test_a_strategy_refuses_what_it_cannot_make() -> None:
    with pytest.raises(ValueError, match="role is 'bot', expected one of system, user, assistant, tool"):
        messages(role="bot")
    with pytest.raises(ValueError, match="max_turns is 0, and a row has at least 1 turn"):
        rows(max_turns=0)


def said(row: dict[str, Any]) -> list[str]:
    return [text_of(message.get("content")) for message in row["messages"]]


CALLS = tool_rows(parallel=True)


@cache
def many_calls() -> list[dict[str, Any]]:
    """Rows that several cases look at: a row with calls takes 20 ms to generate."""
    drawn: list[dict[str, Any]] = []

    @settings(max_examples=120, phases=(Phase.generate,))
    @given(row=CALLS)
    def draw(row: dict[str, Any]) -> None:
        drawn.append(row)

    draw()
    return drawn


RARE: list[tuple[str, st.SearchStrategy[Any], Any]] = [
    (
        "a text repeats an earlier turn",
        rows(),
        lambda row: len({*said(row)}) < len(said(row)) and len(said(row)[0]) > 9,
    ),
    ("a control literal in an answer", rows(), lambda row: holds_a_literal(said(row)[-1])),
    ("an answer ends in a space", rows(), lambda row: said(row)[-1].endswith(" ")),
    ("an empty question", rows(system=False), lambda row: said(row)[0] == ""),
    (
        "a weight of 0 and one of 1",
        rows(weights=True),
        lambda row: {0, 1} <= {m.get("weight") for m in row["messages"]},
    ),
    ("a system message later on", rows(alternating=False), lambda row: row["messages"][-2]["role"] == "system"),
    ("an opening answer", rows(alternating=False), lambda row: row["messages"][0]["role"] == "assistant"),
    ("text chunks", rows(alternating=False), lambda row: isinstance(row["messages"][-1]["content"], list)),
    ("two answers in a row", rows(alternating=False), lambda row: row["messages"][-2]["role"] == "assistant"),
    ("a call without result", CALLS, lambda row: "tool_calls" in row["messages"][-1]),
    ("a rejected call", pairs(tools=True), lambda pair: "tool_calls" in pair["rejected"][-1]),
    ("a pair whose sides call alike", pairs(tools=True), lambda pair: pair["chosen"][:2] == pair["rejected"][:2]),
    (
        "three calls at once",
        CALLS,
        lambda row: any(len(message.get("tool_calls", ())) == 3 for message in row["messages"]),
    ),
    ("a null that the tool takes", CALLS, lambda row: None in parameters_of(row)),
    ("a parameter of the tool", CALLS, lambda row: any(isinstance(one, float) for one in parameters_of(row))),
    ("arguments as text", CALLS, lambda row: any(isinstance(a, str) for a in arguments(row))),
    ("arguments encoded twice", CALLS, lambda row: any(is_json_in_json(a) for a in arguments(row))),
    ("arguments with a key twice", CALLS, lambda row: '{"a": 1, "a": 2}' in arguments(row)),
    ("arguments that are not JSON", CALLS, lambda row: "a=1" in arguments(row)),
    ("arguments with floats", CALLS, lambda row: any("2.50" in a for a in arguments(row) if isinstance(a, str))),
    (
        "results out of order",
        CALLS,
        lambda row: in_order(row) != [m["tool_call_id"] for m in row["messages"] if m["role"] == "tool"],
    ),
    ("a result encoded twice", CALLS, lambda row: any(is_json_in_json(s) for s in results(row))),
    ("a strict tool", CALLS, lambda row: any(tool["function"].get("strict") for tool in row["tools"])),
    (
        "a tool without description",
        CALLS,
        lambda row: any("description" not in tool["function"] for tool in row["tools"]),
    ),
    ("thinking before an answer", rows(thinking=True), lambda row: thoughts(row) and "text" in kinds(row)),
    (
        "thinking that is left open",
        rows(thinking=True),
        lambda row: any(thought.get("closed") is False for thought in thoughts(row)),
    ),
    ("thinking before a call", tool_rows(thinking=True), lambda row: thoughts(row) and "text" not in kinds(row)),
    (
        "a schema",
        rows(formats=True),
        lambda row: row.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("properties"),
    ),
    (
        "a result in chunks",
        tool_rows(result_chunks=True),
        lambda row: any(isinstance(one, list) for one in results(row)),
    ),
    ("an id of any form", tool_rows(any_ids=True), lambda row: any(len(one) > 12 for one in in_order(row))),
    ("a reasoning effort", rows(efforts=("low", "high")), lambda row: row.get("reasoning_effort") == "high"),
    ("arguments as a nested object", CALLS, lambda row: any(nested(a) for a in arguments(row))),
    ("a result that is JSON", CALLS, lambda row: any(s.startswith("{") for s in results(row))),
    (
        "a result that is a number",
        CALLS,
        lambda row: any(s.lstrip("-").isdigit() and len(s) > 2 for s in results(row)),
    ),
    ("a named result", CALLS, lambda row: any("name" in message for message in row["messages"])),
    ("a long word", hostile_text(), lambda text: any(len(word) > 300 for word in text.split())),
    ("a no-break space", hostile_text(), lambda text: "\u00a0" in text),
    ("SentencePiece's space", hostile_text(), lambda text: text.startswith("\u2581")),
    ("a line separator", hostile_text(), lambda text: "\u2028" in text),
    ("a zero-width joiner", hostile_text(), lambda text: "\u200d" in text),
    ("a null character", hostile_text(), lambda text: "\x00" in text),
    ("an astral character", hostile_text(), lambda text: any(ord(character) > 0xFFFF for character in text)),
]


def arguments(row: dict[str, Any]) -> list[Any]:
    return [call["function"]["arguments"] for message in row["messages"] for call in message.get("tool_calls", ())]


def parameters_of(row: dict[str, Any]) -> list[Any]:
    """The values of arguments that the schema of the tool names."""
    named = {tool["function"]["name"]: tool["function"]["parameters"]["properties"] for tool in row["tools"]}
    calls = [call["function"] for message in row["messages"] for call in message.get("tool_calls", ())]
    objects = [(call["arguments"], named[call["name"]]) for call in calls if isinstance(call["arguments"], dict)]
    return [value for given, names in objects for name, value in given.items() if name in names]


def is_json_in_json(text: Any) -> bool:
    return isinstance(text, str) and text.startswith('"{')


def in_order(row: dict[str, Any]) -> list[str]:
    answered = {message["tool_call_id"] for message in row["messages"] if message["role"] == "tool"}
    made = [call["id"] for message in row["messages"] for call in message.get("tool_calls", ())]
    return [call_id for call_id in made if call_id in answered]


def chunks(row: dict[str, Any]) -> list[dict[str, Any]]:
    contents = [message.get("content") for message in row["messages"] if message["role"] == "assistant"]
    return [chunk for content in contents if isinstance(content, list) for chunk in content]


def thoughts(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [chunk for chunk in chunks(row) if chunk["type"] == "thinking"]


def kinds(row: dict[str, Any]) -> set[str]:
    return {chunk["type"] for chunk in chunks(row)}


def nested(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(inner, dict | list) and inner for inner in value.values())


def results(row: dict[str, Any]) -> list[str]:
    return [message["content"] for message in row["messages"] if message["role"] == "tool"]


@pytest.mark.parametrize(("strategy", "wanted"), [case[1:] for case in RARE], ids=[case[0] for case in RARE])
def test_the_rare_is_generated(strategy: st.SearchStrategy[Any], wanted: Any) -> None:
    if strategy is not CALLS or not any(map(wanted, many_calls())):
        found(strategy, wanted)


def test_what_is_not_generated_is_not_found() -> None:
    with pytest.raises(NoSuchExample):
        found(hostile_text(), lambda text: any(0xD800 <= ord(character) < 0xE000 for character in text), most=500)


def test_rows_shrink_to_short_ascii() -> None:
    assert found(rows(), lambda row: True, shrink=True) == {
        "messages": [{"role": "user", "content": "0"}, {"role": "assistant", "content": "0"}]
    }


def test_a_hostile_row_shrinks_to_its_cause() -> None:
    row = found(rows(max_turns=2, system=False), lambda row: holds_a_literal(said(row)[0]), shrink=True)
    assert said(row)[0] in CONTROL_LITERALS
    assert said(row)[1:] == ["0"]


def holds_a_literal(text: str) -> bool:
    return any(literal in text for literal in CONTROL_LITERALS)


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_every_control_token_is_among_the_literals(name: str) -> None:
    reserved = re.compile(r"\[control_\d+\]|<SPECIAL_\d+>")
    literals = oracle_of(name).control_tokens.values()
    assert {literal for literal in literals if not reserved.fullmatch(literal)} <= set(CONTROL_LITERALS)


def test_every_special_token_of_every_version_is_among_the_literals() -> None:
    assert {token.value for token in SpecialTokens} <= set(CONTROL_LITERALS)


def test_the_examples_in_the_docstrings_run() -> None:
    outcomes = [doctest.testmod(module) for module in (chats, texts)]
    assert sum(outcome.failed for outcome in outcomes) == 0
    assert sum(outcome.attempted for outcome in outcomes) >= 21


def test_the_package_offers_the_strategies_by_name() -> None:
    public = {name for name in vars(strategies) if name[0] in string.ascii_lowercase}
    assert {
        "rows",
        "conversations",
        "messages",
        "pairs",
        "tool_rows",
        "fim_rows",
        "hostile_text",
        "plain_text",
    } <= public


@pytest.mark.parametrize(("name", "count"), [("spm-v1", 4), ("spm-v3", 8), ("derived-v13-thinking", 16)])
def test_objectives_are_those_that_a_tokenizer_can_express(name: str, count: int) -> None:
    controls = oracle_named(name).control_ids
    found: set[str] = set()

    @settings(max_examples=300, database=None)
    @given(strategies.objectives(controls))
    def collect(words: str) -> None:
        Objective.of(words, "test").require(controls, name, "test")
        found.add(words)

    collect()
    assert len(found) == count
