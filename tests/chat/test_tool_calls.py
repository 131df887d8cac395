"""What a model generated is read back as the calls that were encoded, and what is no call is said to be none."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_mistral_lora.chat.completions import (
    GeneratedCall,
    MalformedCallError,
    call_violation,
    read_calls,
)
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.versions import version_facts

TOOLS = [
    {"type": "function", "function": {"name": name, "description": "", "parameters": {"type": "object"}}}
    for name in ("weather", "get_time")
]
WITH_ID = ("v3", "v7", "v11")


def completion(oracle: Oracle, *calls: tuple[str, Any, str]) -> list[int]:
    """Return the ids of a turn that makes these calls: name, arguments, id."""
    made = [{"id": i, "type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for n, a, i in calls]
    messages = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "tool_calls": made}]
    encoded = oracle.encode({"messages": messages, "tools": TOOLS})
    last = [span for span in encoded.spans if span.role == "assistant"]
    return list(encoded.input_ids[last[0].start : last[-1].end])


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="▁"), max_size=5)
"""SentencePiece writes a space as ▁, so that the two are one text in its ids."""

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | TEXT,
    lambda one: st.lists(one, max_size=2) | st.dictionaries(TEXT, one, max_size=2),
    max_leaves=4,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["weather", "get_time"]),
        st.dictionaries(TEXT, JSON, max_size=2),
        st.text("abcXYZ019", min_size=9, max_size=9),
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda call: call[2],
)


def read_back(oracle: Oracle, calls: list[tuple[str, Any, str]]) -> None:
    found = read_calls(completion(oracle, *calls), oracle)
    has_id = oracle.version in WITH_ID
    assert found == [GeneratedCall(name, arguments, i if has_id else None) for name, arguments, i in calls]
    assert {call_violation(call, ("weather", "get_time"), oracle.facts) for call in found} == {""}


@given(calls=CALLS)
def test_calls_are_read_back(oracle_with_tools: Oracle, calls: list[tuple[str, Any, str]]) -> None:
    read_back(oracle_with_tools, calls)


@given(calls=CALLS)
def test_calls_of_newer_versions_are_read_back(newer_oracle: Oracle, calls: list[tuple[str, Any, str]]) -> None:
    read_back(newer_oracle, calls)


def test_an_answer_in_words_is_no_call(oracle_with_tools: Oracle) -> None:
    ids = [*oracle_with_tools.encode_text('[{"name": "weather", "arguments": {}}]'), oracle_with_tools.eos_id]
    with pytest.raises(MalformedCallError, match=r"no \[TOOL_CALLS\]"):
        read_calls(ids, oracle_with_tools)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"name": "weather", "arguments": {}', "not valid JSON"),
        ('{"name": "weather", "arguments": {}}', "not a list of calls"),
        ("[]", "not a list of calls"),
        ('[{"name": "weather"}]', "not a call"),
        ('[{"name": 3, "arguments": {}}]', "not a call"),
        ('[{"name": "weather", "arguments": {"x": NaN}}]', "NaN is not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_list_that_is_none_of_calls(oracle_of: Callable[[str], Oracle], text: str, said: str) -> None:
    oracle = oracle_of("spm-v3")
    ids = [oracle.tool_calls_id or 0, *oracle.encode_text(text), oracle.eos_id]
    with pytest.raises(MalformedCallError, match=said):
        read_calls(ids, oracle)


SUM, NOW = GeneratedCall("add", {"a": 3.5, "b": 4}, None), GeneratedCall("now", {}, None)


@pytest.mark.parametrize(
    ("before", "text", "calls"),
    [
        ("", ' [{"name": "add", "arguments": {"a": 3.5, "b": 4}}]', [SUM]),
        ("", '  [ {"name":"add" , "arguments" : {"a": 3.5, "b": 4} } ]', [SUM]),
        ("", '[{"arguments": {"a": 3.5, "b": 4}, "name": "add"}]', [SUM]),
        ("", '[{"arguments": {"name": "Ada"}, "name": "age"}]', [GeneratedCall("age", {"name": "Ada"}, None)]),
        ("", '[{"name": "add", "arguments": {"a": 3.5, "b": 4}}, {"name": "now", "arguments": {}}]', [SUM, NOW]),
        ("Hello", '[{"name": "add", "arguments": {"a": 3.5, "b": 4}}]', [SUM]),
    ],
    ids=["a-space", "spaces", "arguments-first", "name-in-arguments", "several", "text-before"],
)
def test_the_forms_that_parsers_of_servers_read_are_read(
    oracle_of: Callable[[str], Oracle], before: str, text: str, calls: list[GeneratedCall]
) -> None:
    """The forms are those of vLLM's own tests of its parser, tests/tool_parsers/test_mistral_tool_parser.py."""
    oracle = oracle_of("spm-v3")
    ids = [*oracle.encode_text(before), oracle.tool_calls_id or 0, *oracle.encode_text(text), oracle.eos_id]
    assert read_calls(ids, oracle) == calls


@pytest.mark.parametrize(
    "text",
    ['[{"name": "add", "arguments": {}}]\nmore text', 'junk [{"name": "add", "arguments": {}}]', "not JSON"],
    ids=["text-after", "text-before-the-list", "text-alone"],
)
def test_a_list_that_parsers_of_servers_repair_is_malformed(oracle_of: Callable[[str], Oracle], text: str) -> None:
    """vLLM's parser drops the text around the list: a model that was trained on calls must not write it."""
    oracle = oracle_of("spm-v3")
    with pytest.raises(MalformedCallError, match="not valid JSON"):
        read_calls([oracle.tool_calls_id or 0, *oracle.encode_text(text), oracle.eos_id], oracle)


def test_two_lists_of_calls_are_malformed(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("spm-v3")
    one_list = [oracle.tool_calls_id or 0, *oracle.encode_text('[{"name": "add", "arguments": {}}]')]
    with pytest.raises(MalformedCallError, match="twice in one turn"):
        read_calls([*one_list, *one_list, oracle.eos_id], oracle)


def test_a_call_that_lacks_a_marker(newer_oracle: Oracle) -> None:
    ids = completion(newer_oracle, ("weather", {"city": "Rome"}, "abcdefghi"))
    arguments = next(token for token, literal in newer_oracle.control_tokens.items() if literal == "[ARGS]")
    with pytest.raises(MalformedCallError, match="a call with the markers"):
        read_calls([token for token in ids if token != arguments], newer_oracle)
    with pytest.raises(MalformedCallError, match="not valid JSON"):
        read_calls([*ids[:-2], ids[-1]], newer_oracle)


@pytest.mark.parametrize(
    ("call", "version", "said"),
    [
        (GeneratedCall("wether", {}, "abcdefghi"), "v3", "no tool is named 'wether'"),
        (GeneratedCall("weather", "{}", "abcdefghi"), "v3", "not an object"),
        (GeneratedCall("weather", {}, "abcdefgh"), "v3", "not 9 letters and digits"),
        (GeneratedCall("weather", {}, None), "v11", "not 9 letters and digits"),
        (GeneratedCall("weather", {}, 123456789), "v3", "the id of weather is 123456789, not 9 letters and digits"),
        (GeneratedCall("weather", {}, None), "v2", ""),
        (GeneratedCall("weather", {}, None), "v13", ""),
    ],
)
def test_a_call_that_is_not_well_formed(call: GeneratedCall, version: str, said: str) -> None:
    found = call_violation(call, ("weather",), version_facts(version))
    assert said in found
    assert bool(found) is bool(said)
