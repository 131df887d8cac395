"""Every generated row keeps the laws of encoding, alone and beside a row that differs in one thing."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import each_oracle
import pytest
from each_oracle import LAYOUTS, of_each
from encoding_laws import (
    LAWS,
    TOOL,
    TWO_TURNS,
    WITH_TOOLS,
    Case,
    hold,
    reference_ids,
    scanned_labels,
    text_holds_no_control_token,
    tool_calls_are_supervised_from_their_marker_on,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.validator import ValidationMode

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.strategies import (
    CONTROL_LITERALS,
    conversations,
    plain_text,
    rows,
    tool_rows,
)

few = settings(max_examples=10)


@settings(max_examples=15)
@given(row=rows())
@of_each(*LAYOUTS)
def test_laws_hold_for_alternating_rows(oracle: Oracle, row: dict[str, Any]) -> None:
    encoded = hold(oracle, row)
    if oracle.version != "v1":
        assert encoded.labels == scanned_labels(oracle, encoded.input_ids)


@settings(max_examples=15)
@given(row=rows(alternating=False, weights=True))
@of_each(*LAYOUTS)
def test_laws_hold_for_rows_of_any_order(oracle: Oracle, row: dict[str, Any]) -> None:
    hold(oracle, row)


@few
@given(single=tool_rows(), several=tool_rows(parallel=True))
@of_each(*each_oracle.WITH_TOOLS)
def test_laws_hold_for_rows_with_tools(oracle: Oracle, single: dict[str, Any], several: dict[str, Any]) -> None:
    encoded = hold(oracle, single if oracle.version == "v2" else several)
    assert encoded.labels == scanned_labels(oracle, encoded.input_ids)


@few
@given(
    single=tool_rows(alternating=False, weights=True), several=tool_rows(parallel=True, alternating=False, weights=True)
)
@of_each(*each_oracle.WITH_TOOLS)
def test_laws_hold_for_rows_with_tools_of_any_order(
    oracle: Oracle, single: dict[str, Any], several: dict[str, Any]
) -> None:
    hold(oracle, single if oracle.version == "v2" else several)


MARKERS_WITHIN_CALLS = {text_holds_no_control_token, tool_calls_are_supervised_from_their_marker_on}


@few
@given(row=rows(tools=None, parallel=True))
@of_each(*each_oracle.NEWER)
def test_laws_hold_for_versions_that_mark_each_call(oracle: Oracle, row: dict[str, Any]) -> None:
    case = Case(oracle, row, oracle.encode(row))
    for law in set(LAWS) - MARKERS_WITHIN_CALLS:
        law(case)
    assert case.labels == scanned_labels(oracle, case.encoded.input_ids)


# Laws that compare two rows.


@few
@given(row=tool_rows(parallel=True), data=st.data())
@of_each(*each_oracle.NEWER)
def test_newer_versions_put_tool_results_in_the_order_of_the_calls(
    oracle: Oracle, row: dict[str, Any], data: st.DataObject
) -> None:
    messages: list[dict[str, Any]] = []
    for role, group in itertools.groupby(row["messages"], key=lambda message: message["role"]):
        run = list(group)
        messages += data.draw(st.permutations(run)) if role == "tool" else run
    assert oracle.encode(row | {"messages": messages}) == oracle.encode(row)


@few
@given(conversation=conversations(text=plain_text()), literal=st.sampled_from(CONTROL_LITERALS), data=st.data())
@of_each(*LAYOUTS)
def test_a_control_literal_in_text_changes_no_control_token(
    oracle: Oracle, conversation: list[dict[str, Any]], literal: str, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(conversation) - 1))
    injected = copy.deepcopy(conversation)
    text = injected[at]["content"]
    cut = data.draw(st.integers(0, len(text)))
    injected[at]["content"] = text[:cut] + literal + text[cut:]
    before, after = oracle.encode({"messages": conversation}), oracle.encode({"messages": injected})
    assert control_counts(oracle, before) == control_counts(oracle, after)
    assert [(s.turn, s.kind, s.supervised) for s in before.spans] == [
        (s.turn, s.kind, s.supervised) for s in after.spans
    ]


def control_counts(oracle: Oracle, encoded: EncodedRow) -> Counter[int]:
    return Counter(token for token in encoded.input_ids if token in oracle.control_tokens)


@few
@given(row=rows(), data=st.data())
@of_each(*LAYOUTS)
def test_weights_of_an_alternating_row_mask_turns_and_change_no_id(
    oracle: Oracle, row: dict[str, Any], data: st.DataObject
) -> None:
    weighted = copy.deepcopy(row)
    answers = [message for message in weighted["messages"] if message["role"] == "assistant"]
    weights = data.draw(st.lists(st.sampled_from((0, 1)), min_size=len(answers), max_size=len(answers)))
    for message, weight in zip(answers, weights, strict=True):
        message["weight"] = weight
    plain, masked = oracle.encode(row), oracle.encode(weighted)
    assert masked.input_ids == plain.input_ids
    turns = {span.turn for span in plain.spans if span.role == "assistant"}
    kept = dict(zip(sorted(turns), weights, strict=True))
    assert masked.spans == tuple(s._replace(supervised=s.supervised and kept[s.turn] == 1) for s in plain.spans)
    assert masked.supervised_tokens == sum(s.end - s.start for s in masked.spans if s.supervised)


def test_a_row_of_weight_zero_has_no_label(oracle: Oracle) -> None:
    row = {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 0}]}
    encoded = oracle.encode(row)
    assert set(encoded.labels or ()) == {IGNORE_INDEX}
    assert encoded.supervised_tokens == 0


@pytest.mark.parametrize(("weights", "turns"), [((1, 1), 1), ((None, 1), 1), ((0, 0), 1), ((0, 1), 2), ((1, 0), 2)])
def test_only_consecutive_answers_of_equal_weight_are_one_turn(
    oracle: Oracle, weights: tuple[int | None, int | None], turns: int
) -> None:
    first, second = weights
    row = {
        "messages": [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a", "weight": first},
            {"role": "assistant", "content": "b", "weight": second},
        ]
    }
    encoded = oracle.encode(row)
    texts = [s for s in encoded.spans if s.role == "assistant" and s.kind == "text"]
    said = [oracle.decode(encoded.input_ids[s.start : s.end]) for s in texts]
    assert said == (["a\n\nb"] if turns == 1 else ["a", "b"])
    assert encoded.input_ids.count(oracle.eos_id) == turns
    assert (encoded.labels or ()).count(oracle.eos_id) == len([w for w in weights if w != 0]) // (3 - turns)


def in_the_other_form(arguments: Any, *, escaped: bool) -> Any:
    """Arguments as JSON where they are an object, and as an object where they are its JSON; any other text stays."""
    if not isinstance(arguments, str):
        return json.dumps(arguments, ensure_ascii=escaped, indent=None if escaped else 1)
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments
    return value if isinstance(value, dict) else arguments


@few
@given(single=tool_rows(), several=tool_rows(parallel=True), escaped=st.booleans())
@of_each(*each_oracle.WITH_TOOLS)
def test_arguments_as_an_object_and_as_its_json_are_one(
    oracle: Oracle, single: dict[str, Any], several: dict[str, Any], escaped: bool
) -> None:
    row = single if oracle.version == "v2" else several
    other = copy.deepcopy(row)
    for call in (call for message in other["messages"] for call in message.get("tool_calls", ())):
        call["function"]["arguments"] = in_the_other_form(call["function"]["arguments"], escaped=escaped)
    assert oracle.encode(other) == oracle.encode(row)


@few
@given(row=tool_rows(), strict=st.booleans())
@of_each(*each_oracle.WITH_TOOLS)
def test_strict_in_tools_changes_nothing(oracle: Oracle, row: dict[str, Any], strict: bool) -> None:
    other = copy.deepcopy(row)
    for tool in other["tools"]:
        tool["function"]["strict"] = strict
    assert oracle.encode(other) == oracle.encode(row)


@pytest.mark.parametrize("function", [{"name": "f"}, {"name": "f", "description": None, "strict": None}])
def test_what_is_null_or_absent_in_a_tool_is_its_default(oracle_with_tools: Oracle, function: dict[str, Any]) -> None:
    tools = [{"type": "function", "function": function | {"parameters": {}}}]
    assert oracle_with_tools.encode(WITH_TOOLS | {"tools": tools}) == oracle_with_tools.encode(WITH_TOOLS)


@few
@given(row=rows(), tools=st.lists(st.just(TOOL), max_size=1))
@of_each("spm-v1", "spm-v2", "spm-v3", "spm-v7", "derived-v7")
def test_the_prompt_is_what_the_last_answer_follows(
    oracle: Oracle, row: dict[str, Any], tools: list[dict[str, Any]]
) -> None:
    if tools and oracle.version != "v1":
        row = row | {"tools": tools}
    encoded, prompt = oracle.encode(row), oracle.encode_prompt(row)
    last = max(span.turn for span in encoded.spans if span.turn is not None)
    assert len(prompt) == min(span.start for span in encoded.spans if span.turn == last)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert prompt == reference_ids(oracle, row | {"messages": row["messages"][:-1]}, ValidationMode.test)


@few
@given(row=tool_rows())
@of_each(*each_oracle.WITH_TOOLS)
def test_the_prompt_of_a_tool_row_is_a_prefix_of_the_row(oracle: Oracle, row: dict[str, Any]) -> None:
    prompt = oracle.encode_prompt(row)
    encoded = oracle.encode(row)
    assert encoded.input_ids[: len(prompt)] == prompt
    assert all(label == IGNORE_INDEX for label in (encoded.labels or ())[len(prompt) - 1 : len(prompt)])
    assert all(label != IGNORE_INDEX for label in (encoded.labels or ())[len(prompt) :])


@few
@given(conversation=conversations(system=True, text=plain_text()), question=plain_text(), answer=plain_text())
@of_each(*LAYOUTS)
def test_another_turn_moves_at_most_the_system_prompt(
    oracle: Oracle, conversation: list[dict[str, Any]], question: str, answer: str
) -> None:
    longer = [*conversation, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    one, two = oracle.encode({"messages": conversation}), oracle.encode({"messages": longer})
    assert answers(two)[:-1] == answers(one)
    stays = oracle.version in ("v1", "v7")
    assert (two.input_ids[: len(one.input_ids)] == one.input_ids) is stays
    if stays:
        assert (two.labels or ())[: len(one.input_ids)] == one.labels


@few
@given(single=tool_rows(), several=tool_rows(parallel=True))
@of_each(*each_oracle.WITH_TOOLS, *each_oracle.NEWER)
def test_another_turn_changes_no_earlier_answer_of_a_row_with_tools(
    oracle: Oracle, single: dict[str, Any], several: dict[str, Any]
) -> None:
    row = several if oracle.facts.parallel_calls else single
    if row["messages"][-1].get("tool_calls") or not oracle.facts.keeps_calls:
        return  # no question may follow a call, and v2 leaves earlier calls out
    question, answer = {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Then."}
    one, two = oracle.encode(row), oracle.encode(row | {"messages": [*row["messages"], question, answer]})
    assert answers(two)[:-1] == answers(one)
    assert trained(two)[: len(trained(one))] == trained(one)
    has_system = any(message["role"] == "system" for message in row["messages"])
    moves = oracle.facts.tools_in == "last-user-turn" or (has_system and oracle.facts.system_in == "last-user-turn")
    if not moves:
        assert two.input_ids[: len(one.input_ids)] == one.input_ids
        assert (two.labels or ())[: len(one.input_ids)] == one.labels


def trained(encoded: EncodedRow) -> list[list[bool]]:
    return [[span.supervised for span in spans] for spans in encoded.answer_spans.values()]


@few
@given(row=rows(weights=True), data=st.data())
@of_each(*LAYOUTS, *each_oracle.NEWER)
def test_neighbours_of_one_role_are_one_turn_with_a_blank_line_between(
    oracle: Oracle, row: dict[str, Any], data: st.DataObject
) -> None:
    messages = row["messages"]
    spoken_at = [n for n, message in enumerate(messages) if message["role"] in ("user", "assistant")]
    at = data.draw(st.sampled_from(spoken_at))
    text = "\n\n".join(filter(None, ("One.", messages[at]["content"])))
    first, joined = (messages[at] | {"content": content} for content in ("One.", text))
    apart = oracle.encode(row | {"messages": [*messages[:at], first, *messages[at:]]})
    assert apart == oracle.encode(row | {"messages": [*messages[:at], joined, *messages[at + 1 :]]})


@few
@given(row=tool_rows(parallel=True, any_ids=True))
@of_each(*sorted({*each_oracle.NEWER} - {"derived-v11"}))
def test_from_v13_on_the_ids_of_calls_change_nothing(oracle: Oracle, row: dict[str, Any]) -> None:
    other, ids = copy.deepcopy(row), dict[str, str]()
    for message in other["messages"]:
        for call in message.get("tool_calls", ()):
            call["id"] = ids.setdefault(call["id"], f"call_{len(ids):05}")
        if message["role"] == "tool":
            message["tool_call_id"] = ids[message["tool_call_id"]]
    assert oracle.encode(other) == oracle.encode(row)


@few
@given(row=rows(efforts=("none", "low", "high"), formats=True))
@of_each("derived-v15-schema")
def test_the_settings_of_a_row_stand_once_before_the_first_answer(oracle: Oracle, row: dict[str, Any]) -> None:
    encoded = oracle.encode(row)
    opens, closes = (encoded.input_ids.index(oracle.control_ids[name]) for name in SETTINGS)
    assert [encoded.input_ids.count(oracle.control_ids[name]) for name in SETTINGS] == [1, 1]
    assert closes < min(span.start for span in encoded.spans if span.role == "assistant")
    shown = json.loads(oracle.decode(encoded.input_ids[opens + 1 : closes]))
    schema = ((row.get("response_format") or {}).get("json_schema") or {}).get("schema")
    # as text: the order of a schema's keys is the order of the answer's
    assert json.dumps(shown.get("json_schema")) == json.dumps(schema)
    assert shown["reasoning_effort"] == row.get("reasoning_effort", "none")


SETTINGS = ("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]")


def answers(encoded: EncodedRow) -> list[tuple[int, ...]]:
    turns = sorted({span.turn for span in encoded.spans if span.turn is not None and span.role == "assistant"})
    of_turn = {turn: [span for span in encoded.spans if span.turn == turn] for turn in turns}
    return [encoded.input_ids[spans[0].start : spans[-1].end] for spans in of_turn.values()]


@pytest.mark.parametrize("name", ["spm-v2", "spm-v3", "tekken-240718", "tekken-240911"])
def test_the_system_prompt_stands_beside_the_last_user_turn(oracle_of: Callable[[str], Oracle], name: str) -> None:
    texts = [(piece.turn, piece.text) for piece in oracle_of(name).traced_texts(TWO_TURNS) if piece.text]
    assert texts == [(0, "u"), (1, "a"), (2, "s\n\nv"), (3, "b")]


@few
@given(row=rows(tools=None, alternating=False))
@of_each(*each_oracle.WITH_TOOLS)
def test_pieces_hold_the_ids_and_encode_alone_to_the_same(oracle: Oracle, row: dict[str, Any]) -> None:
    pieces = oracle.traced_texts(row)
    assert tuple(t for piece in pieces for t in piece.ids) == oracle.encode(row).input_ids
    for piece in pieces:
        if piece.text is None:
            assert len(piece.ids) == 1
            assert piece.ids[0] in oracle.control_tokens
        else:
            assert piece.ids == oracle.encode_text(piece.text)
