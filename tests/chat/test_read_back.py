"""Ids read back into rows: what is encoded again has the same ids and spans, and other ids are never read as sound."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
from each_oracle import LAYOUTS, NEWER, WITH_TOOLS, of_each, oracle_named
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.experimental.think import _split_content_and_think_chunks
from mistral_common.experimental.tools import _decode_tool_calls, _split_content_and_tool_calls
from read_back_limits import looks_like_a_fault

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.read_back import UnreadableIdsError, read_back
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.strategies import plain_text, rows, tool_rows

PARALLEL = [name for name in WITH_TOOLS if name != "spm-v2"]
ANY_ORDER: dict[str, bool] = {"alternating": False, "weights": True}

few = settings(max_examples=10)


def renumbered(spans: Iterable[Span]) -> list[Span]:
    """Return spans whose turns are counted as the ids show them: turns that are not encoded have no number."""
    turns: dict[int, int] = {}
    return [
        span if span.turn is None else span._replace(turn=turns.setdefault(span.turn, len(turns))) for span in spans
    ]


def holds(oracle: Oracle, row: dict[str, Any]) -> None:
    if looks_like_a_fault(row, oracle):
        return
    encoded = oracle.encode(row)
    again = oracle.encode(read_back(encoded.input_ids, oracle, encoded.labels))
    assert again.input_ids == encoded.input_ids
    if not encoded.supervised_tokens:
        # a row without a label is read as one that should have labels
        again = without_loss(again)
    assert again.labels == encoded.labels
    if not oracle.facts.control_tokens:
        return  # markers that are text: a question may be two turns or one, and an answer of weight 0 a question
    if oracle.facts.keeps_calls:
        assert again == encoded
    assert renumbered(again.spans) == renumbered(encoded.spans)


def without_loss(encoded: EncodedRow) -> EncodedRow:
    return EncodedRow.from_spans(encoded.input_ids, [span._replace(supervised=False) for span in encoded.spans])


@few
@given(row=rows())
@of_each(*LAYOUTS, *NEWER)
def test_rows_are_read_back(oracle: Oracle, row: dict[str, Any]) -> None:
    holds(oracle, row)


@few
@given(row=rows(**ANY_ORDER))
@of_each(*LAYOUTS, *NEWER)
def test_rows_of_any_order_and_weight_are_read_back(oracle: Oracle, row: dict[str, Any]) -> None:
    holds(oracle, row)


@few
@given(row=tool_rows(**ANY_ORDER))
@of_each(*WITH_TOOLS, *NEWER)
def test_rows_with_tools_are_read_back(oracle: Oracle, row: dict[str, Any]) -> None:
    holds(oracle, row)


@few
@given(row=tool_rows(parallel=True, **ANY_ORDER))
@of_each(*PARALLEL, *NEWER)
def test_rows_with_parallel_calls_are_read_back(oracle: Oracle, row: dict[str, Any]) -> None:
    holds(oracle, row)


@few
@given(row=rows(tools=None, parallel=True, thinking=True, any_ids=True, **ANY_ORDER))
@of_each("derived-v13-thinking", "derived-v15", "derived-v15-schema")
def test_rows_with_thinking_are_read_back(oracle: Oracle, row: dict[str, Any]) -> None:
    holds(oracle, row)


@few
@given(
    row=rows(
        tools=None,
        parallel=True,
        thinking=True,
        any_ids=True,
        efforts=("none", "low", "high"),
        formats=True,
        result_chunks=True,
        **ANY_ORDER,
    )
)
@of_each("derived-v15", "derived-v15-schema")
def test_rows_with_settings_are_read_back(oracle: Oracle, row: dict[str, Any]) -> None:
    holds(oracle, row)


@few
@given(row=rows(tools=None, parallel=True, text=plain_text()))
@of_each(*PARALLEL, *NEWER)
def test_the_answers_are_those_that_mistral_commons_own_decoder_reads(oracle: Oracle, row: dict[str, Any]) -> None:
    encoded = oracle.encode(row)
    back = read_back(encoded.input_ids, oracle, encoded.labels)
    turns: dict[int | None, list[int]] = {}
    for span in encoded.spans:
        if span.role == "assistant" and span.kind != "eos":
            turns.setdefault(span.turn, []).extend(encoded.input_ids[span.start : span.end])
    answers = [message for message in back.messages if message["role"] == "assistant"]
    assert len(answers) == len(turns)
    assert oracle.tool_calls_id is not None
    for answer, ids in zip(answers, turns.values(), strict=True):
        content, calls = _split_content_and_tool_calls(ids, oracle.tool_calls_id)
        assert (answer.get("content") or "") == oracle.decode(content)
        read = [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for call in answer.get("tool_calls", ())
        ]
        # its decoder of calls takes arguments that are an object alone
        if all(isinstance(arguments, dict) for _, arguments in read):
            decoded = _decode_tool_calls(calls, oracle._text)
            assert read == [(call.function.name, json.loads(call.function.arguments)) for call in decoded]


def test_thinking_is_that_which_mistral_commons_own_decoder_reads() -> None:
    oracle = oracle_named("derived-v13-thinking")
    chunks = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "Yes."}]
    row = {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": chunks}]}
    encoded = oracle.encode(row)
    literals = {literal: token for token, literal in oracle.control_tokens.items()}
    answer = encoded.input_ids[encoded.input_ids.index(literals["[/INST]"]) + 1 : -1]
    parts = _split_content_and_think_chunks(list(answer), literals["[THINK]"], literals["[/THINK]"])
    read = read_back(encoded.input_ids, oracle).messages[-1]["content"]
    assert read == chunks
    assert [oracle.decode(ids) for ids, _ in parts] == [chunk[chunk["type"]] for chunk in read]


def conversation(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]}


def test_a_label_decides_which_marker_of_a_text_is_a_marker() -> None:
    oracle = oracle_named("spm-v1")
    readings = [("a", "b [/INST] c"), ("a [/INST] b", "c")]
    encoded = [oracle.encode(conversation(*texts)) for texts in readings]
    assert encoded[0].input_ids == encoded[1].input_ids
    assert encoded[0].labels != encoded[1].labels
    for texts, one in zip(readings, encoded, strict=True):
        back = read_back(one.input_ids, oracle, one.labels)
        assert [message["content"] for message in back.messages] == [*texts]


@pytest.mark.parametrize("name", ["spm-v2", "spm-v3"])
def test_a_system_message_is_read_between_turns_of_the_user_alone(name: str) -> None:
    oracle = oracle_named(name)
    system = {"role": "system", "content": "Be brief."}
    question, other, answer = ({"role": role, "content": "x"} for role in ("user", "user", "assistant"))
    row = {"messages": [question, system, other, answer]}
    encoded = oracle.encode(row)
    assert list(read_back(encoded.input_ids, oracle).messages) == row["messages"]
    # beside a single turn of the user, nothing shows where the prompt ends
    encoded = oracle.encode({"messages": [system, question, answer]})
    assert [message["content"] for message in read_back(encoded.input_ids, oracle).messages] == ["Be brief.\n\nx", "x"]


def test_turns_of_the_user_that_only_a_template_makes_are_not_read_as_sound() -> None:
    oracle = oracle_named("spm-v3")
    text = oracle.encode_text("Be brief.")
    encoded = oracle.encode(conversation("Which colour?", "Blue."))
    ids = (1, 3, *text, 4, *encoded.input_ids[1:])
    assert oracle.encode(read_back(ids, oracle)).input_ids != ids


def test_answers_that_follow_each_other_have_other_weights() -> None:
    oracle = oracle_named("spm-v3")
    row = conversation("u", "a", "v", "b")
    del row["messages"][2]
    row["messages"][1]["weight"] = 0
    encoded = oracle.encode(row)
    assert [message.get("weight") for message in read_back(encoded.input_ids, oracle, encoded.labels).messages[1:]] == [
        0,
        None,
    ]
    assert [message.get("weight") for message in read_back(encoded.input_ids, oracle).messages[1:]] == [None, 0]
    # both with labels: mistral-common would have joined them
    trained = [
        token if n >= encoded.input_ids.index(4) + 1 else IGNORE_INDEX for n, token in enumerate(encoded.input_ids)
    ]
    assert oracle.encode(read_back(encoded.input_ids, oracle, trained)).input_ids != encoded.input_ids


def test_calls_in_turns_of_their_own_are_read_as_calls_of_one_turn() -> None:
    oracle = oracle_named("spm-v3")
    calls = [
        {"id": call_id, "type": "function", "function": {"name": "f", "arguments": {}}}
        for call_id in ("abcdefgh1", "abcdefgh2")
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in calls]
    question, answer = conversation("u", "a")["messages"]
    row = {"messages": [question, {"role": "assistant", "tool_calls": calls}, *results, answer]}
    ids = list(oracle.encode(row).input_ids)
    at = ids.index(2)
    one = oracle.encode({"messages": [question, {"role": "assistant", "tool_calls": calls[:1]}]}).input_ids
    two = oracle.encode({"messages": [question, {"role": "assistant", "tool_calls": calls[1:]}]}).input_ids
    split = (*one, *two[two.index(4) + 1 :], *ids[at + 1 :])
    back = read_back(split, oracle, split)
    assert oracle.encode(back).input_ids == tuple(ids) != split


UNREADABLE: dict[str, tuple[str, list[Any], int, str, str]] = {
    "no ids": ("spm-v3", [], 0, "the ids end before the first turn", "<s>"),
    "raw text": ("spm-v3", [1, "It is blue.", 2], 1, "the text 'It is blue.'", "[INST]"),
    "a text without BOS": ("tekken-cut", ["It is blue.", 2], 0, "the text 'It is blue.'", "<s>"),
    "the rest of an answer": ("spm-v7", ["blue.", 2], 0, "the text 'blue.'", "<s>"),
    "cut in the question": ("spm-v3", [1, 3, "Which"], 3, "the ids end within the part after the [INST]", "[/INST]"),
    "cut before the answer": ("spm-v3", [1, 3, "a", 4], 4, "the ids end after a turn of user", "an answer"),
    "an empty answer": ("spm-v3", [1, 3, "a", 4, 2], 4, "the answer is empty", "the text"),
    "an empty last answer": ("spm-v3", [1, 3, "a", 4, "b", 2, 3, "c", 4, 2], 9, "the answer is empty", "the text"),
    "an empty first answer": ("spm-v3", [1, 3, "a", 4, 2, 3, "b", 4, "c", 2], 4, "the answer is empty", "the text"),
    "calls that are not JSON": ("spm-v3", [1, 3, "a", 4, 5, "f()", 2], 4, "'f()'", "JSON behind [TOOL_CALLS]"),
    "tools that are not tools": ("spm-v3", [1, 6, "[1]", 7, 3, "a", 4, "b", 2], 1, "tools[0]", "a list of tools"),
    "a result without an id": (
        "spm-v7",
        [1, 3, "a", 4, 8, "1", 9, "b", 2],
        4,
        "without its call's id",
        "[TOOL_CONTENT]",
    ),
    "spelled markers cut": ("spm-v1", [1, "[INST] Which"], 5, "the ids end within the part", "[/INST]"),
    "raw text where markers are text": ("spm-v1", [1, "It is blue.", 2], 1, "the text 'It is blue.'", "[INST]"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_ids_that_are_no_conversation_are_named_by_their_first_token(name: str) -> None:
    tokenizer, parts, token, found, expected = UNREADABLE[name]
    oracle = oracle_named(tokenizer)
    ids = [token for part in parts for token in (oracle.encode_text(part) if isinstance(part, str) else (part,))]
    with pytest.raises(UnreadableIdsError) as caught:
        read_back(ids, oracle)
    assert caught.value.token == (len(ids) if found.startswith("the ids end") else token)
    assert found in caught.value.found
    assert expected in caught.value.expected


@few
@given(row=rows(), data=st.data())
@of_each("spm-v1", "spm-v3", "tekken-cut", "spm-v7", "derived-v13")
def test_any_ids_are_read_or_refused(oracle: Oracle, row: dict[str, Any], data: st.DataObject) -> None:
    ids = list(oracle.encode(row).input_ids)
    at = data.draw(st.integers(0, len(ids) - 1))
    others = st.sampled_from([*oracle.control_tokens]) | st.integers(0, oracle.vocab_size)
    ids[at : at + data.draw(st.integers(0, 2))] = data.draw(st.lists(others, max_size=2))
    with suppress(UnreadableIdsError, OracleRejection):
        oracle.encode(read_back(ids, oracle))
