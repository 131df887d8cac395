from __future__ import annotations

import copy
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import each_oracle
import pytest
from each_oracle import of_each
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import (
    AssistantMessage,
    FinetuningAssistantMessage,
    SystemMessage,
    ToolMessage,
    UserMessage,
)
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow, Span
from pytest_mistral_lora.chat.oracle import SHIPPED, Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import as_row, text_of, weight_of
from pytest_mistral_lora.errors import OracleRejection, RowError, TokenizerError
from pytest_mistral_lora.strategies import (
    CONTROL_LITERALS,
    conversations,
    hostile_text,
    plain_text,
    rows,
    tool_rows,
)

CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": {"k": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
TWO_TURNS = {
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": "b"},
    ]
}
WITH_TOOLS = {
    "messages": [
        {"role": "user", "content": "u"},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": "2"},
        {"role": "assistant", "content": "b"},
    ],
    "tools": [TOOL],
}


def say(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


# The reference: mistral-common, called as its own documentation does.

CLASSES: dict[str, Any] = {"system": SystemMessage, "user": UserMessage, "tool": ToolMessage}


@cache
def reference(path: str, mode: ValidationMode) -> MistralTokenizer:
    return MistralTokenizer.from_file(path, mode=mode)


def reference_message(message: dict[str, Any], weighted: bool) -> Any:
    fields = {key: value for key, value in message.items() if value is not None}
    if message["role"] != "assistant":
        return CLASSES[message["role"]](**fields)
    if weighted:
        return FinetuningAssistantMessage(**{"weight": 1} | fields)
    return AssistantMessage(**fields)


def reference_ids(
    oracle: Oracle, row: dict[str, Any], mode: ValidationMode = ValidationMode.finetuning
) -> tuple[int, ...]:
    weighted = any("weight" in message for message in row["messages"])
    request: ChatCompletionRequest[Any] = ChatCompletionRequest(
        messages=[reference_message(message, weighted) for message in row["messages"]],
        tools=[Tool(**tool) for tool in row.get("tools", [])] or None,
    )
    return tuple(reference(str(oracle.path), mode).encode_chat_completion(request).tokens)


# Laws of one encoded row.


@dataclass(frozen=True)
class Case:
    oracle: Oracle
    row: dict[str, Any]
    encoded: EncodedRow

    @property
    def labels(self) -> tuple[int, ...]:
        assert self.encoded.labels is not None
        return self.encoded.labels

    @property
    def groups(self) -> list[list[dict[str, Any]]]:
        """The assistant messages of each encoded assistant turn; v2 leaves out tool calls before the last user."""
        messages = self.row["messages"]
        last_user = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=-1)
        kept = [
            group
            for group in as_row(self.row).assistant_groups()
            if not (self.oracle.version == "v2" and messages[group[0]].get("tool_calls") and group[0] < last_user)
        ]
        return [[messages[index] for index in group] for group in kept]

    def ids(self, span: Span) -> tuple[int, ...]:
        return self.encoded.input_ids[span.start : span.end]


def ids_are_mistral_commons(case: Case) -> None:
    assert case.encoded.input_ids == reference_ids(case.oracle, case.row)


def spans_partition_the_ids(case: Case) -> None:
    spans = case.encoded.spans
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])]
    assert spans[-1].end == len(case.encoded.input_ids)
    assert all(span.start < span.end for span in spans)


def labels_are_what_the_spans_say(case: Case) -> None:
    assert len(case.labels) == len(case.encoded.input_ids)
    for span in case.encoded.spans:
        expected = case.ids(span) if span.supervised else (IGNORE_INDEX,) * (span.end - span.start)
        assert case.labels[span.start : span.end] == expected


def only_the_assistant_is_supervised(case: Case) -> None:
    assert {span.role for span in case.encoded.spans if span.supervised} <= {"assistant"}


def weights_decide_which_turns_are_supervised(case: Case) -> None:
    turns = {span.turn: span.supervised for span in case.encoded.spans if span.role == "assistant"}
    assert list(turns.values()) == [weight_of(group[0]) == 1 for group in case.groups]
    assert all(turns[span.turn] == span.supervised for span in case.encoded.spans if span.role == "assistant")


def bos_is_once_at_the_start_without_label(case: Case) -> None:
    assert case.encoded.input_ids.count(case.oracle.bos_id) == 1
    assert case.encoded.spans[0] == Span(None, None, "control", 0, 1, False)
    assert case.encoded.input_ids[0] == case.oracle.bos_id
    assert case.labels[0] == IGNORE_INDEX


def every_assistant_turn_ends_with_eos(case: Case) -> None:
    eos = case.oracle.eos_id
    ends = {span.turn: span for span in case.encoded.spans if span.role == "assistant"}
    assert all(span.kind == "eos" and case.ids(span) == (eos,) for span in ends.values())
    assert case.encoded.input_ids.count(eos) == len(case.groups)
    assert case.labels.count(eos) == sum(weight_of(group[0]) for group in case.groups)


def text_holds_no_control_token(case: Case) -> None:
    control = set(case.oracle.control_tokens)
    for span in case.encoded.spans:
        ids = case.ids(span)
        if span.kind == "text":
            assert not control & set(ids)
        elif span.kind == "tool_call":
            assert ids[0] == case.oracle.tool_calls_id
            assert not control & set(ids[1:])
        else:
            assert set(ids) <= control


def tool_calls_are_supervised_from_their_marker_on(case: Case) -> None:
    marker = case.oracle.tool_calls_id
    calling = [group for group in case.groups if any(message.get("tool_calls") for message in group)]
    assert case.encoded.input_ids.count(marker) == len(calling)
    assert case.labels.count(marker) == sum(weight_of(group[0]) for group in calling)


def assistant_text_decodes_to_the_content(case: Case) -> None:
    spans = [span for span in case.encoded.spans if span.role == "assistant" and span.kind == "text"]
    said = ["\n\n".join(filter(None, (text_of(message.get("content")) for message in group))) for group in case.groups]
    assert [case.oracle.decode(case.ids(span)) for span in spans] == [
        spoken(case.oracle, text) for text in said if text
    ]


def spoken(oracle: Oracle, text: str) -> str:
    """What mistral-common keeps of a text: v2 and later drop spaces at the end; SentencePiece's space is a space."""
    kept = text if oracle.version == "v1" else text.rstrip(" ")
    return kept.replace("\u2581", " ") if oracle.kind == "spm" else kept


def encoding_again_gives_the_same(case: Case) -> None:
    before = copy.deepcopy(case.row)
    assert case.oracle.encode(case.row) == case.encoded
    assert case.row == before


LAWS = (
    ids_are_mistral_commons,
    spans_partition_the_ids,
    labels_are_what_the_spans_say,
    only_the_assistant_is_supervised,
    weights_decide_which_turns_are_supervised,
    bos_is_once_at_the_start_without_label,
    every_assistant_turn_ends_with_eos,
    text_holds_no_control_token,
    tool_calls_are_supervised_from_their_marker_on,
    assistant_text_decodes_to_the_content,
    encoding_again_gives_the_same,
)


def hold(oracle: Oracle, row: dict[str, Any]) -> EncodedRow:
    encoded = oracle.encode(row)
    for law in LAWS:
        law(Case(oracle, row, encoded))
    return encoded


def scanned_labels(oracle: Oracle, ids: tuple[int, ...]) -> tuple[int, ...]:
    """Label by the control ids alone: an answer follows a closing marker. True for alternating rows from v2 on."""
    literals = oracle.control_tokens
    labels, answering = [], False
    for token in ids:
        literal = literals.get(token)
        if literal in ("[INST]", "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[SYSTEM_PROMPT]"):
            answering = False
        labels.append(token if answering else IGNORE_INDEX)
        if literal in ("[/INST]", "[/TOOL_RESULTS]"):
            answering = True
        elif token == oracle.eos_id:
            answering = False
    return tuple(labels)


@given(row=rows())
@of_each(*SHIPPED)
def test_laws_hold_for_alternating_rows(oracle: Oracle, row: dict[str, Any]) -> None:
    encoded = hold(oracle, row)
    if oracle.version != "v1":
        assert encoded.labels == scanned_labels(oracle, encoded.input_ids)


@given(row=rows(alternating=False, weights=True))
@of_each(*SHIPPED)
def test_laws_hold_for_rows_of_any_order(oracle: Oracle, row: dict[str, Any]) -> None:
    hold(oracle, row)


@settings(max_examples=30)
@given(single=tool_rows(), several=tool_rows(parallel=True))
@of_each(*each_oracle.WITH_TOOLS)
def test_laws_hold_for_rows_with_tools(oracle: Oracle, single: dict[str, Any], several: dict[str, Any]) -> None:
    encoded = hold(oracle, single if oracle.version == "v2" else several)
    assert encoded.labels == scanned_labels(oracle, encoded.input_ids)


@settings(max_examples=30)
@given(
    single=tool_rows(alternating=False, weights=True), several=tool_rows(parallel=True, alternating=False, weights=True)
)
@of_each(*each_oracle.WITH_TOOLS)
def test_laws_hold_for_rows_with_tools_of_any_order(
    oracle: Oracle, single: dict[str, Any], several: dict[str, Any]
) -> None:
    hold(oracle, single if oracle.version == "v2" else several)


MARKERS_WITHIN_CALLS = {text_holds_no_control_token, tool_calls_are_supervised_from_their_marker_on}

few = settings(max_examples=25)


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
@of_each(*SHIPPED)
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
@of_each(*SHIPPED)
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
        return json.dumps(arguments, ensure_ascii=escaped)
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
@of_each(*SHIPPED)
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
@of_each(*SHIPPED)
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


# Acceptance.

ROLE_LISTS = st.lists(st.sampled_from(("user", "assistant", "system", "tool", "calls")), min_size=1, max_size=5).filter(
    lambda roles: bool({"assistant", "calls"} & set(roles))
)
IDS = st.sampled_from(("abcdefgh1", "abcdefgh2", "short", "null"))
CONTENTS = st.sampled_from(("x", "", "  "))


@st.composite
def any_rows(draw: st.DrawFn) -> dict[str, Any]:
    def message(role: str) -> dict[str, Any]:
        if role == "calls":
            calls = [copy.deepcopy(CALL) | {"id": draw(IDS)} for _ in range(draw(st.integers(1, 2)))]
            return {"role": "assistant", "content": draw(st.sampled_from(("", "x"))), "tool_calls": calls}
        content = draw(CONTENTS)
        return {"role": role, "content": content} | ({"tool_call_id": draw(IDS)} if role == "tool" else {})

    return {"messages": [message(role) for role in draw(ROLE_LISTS)]}


@settings(max_examples=100)
@given(row=any_rows())
@of_each(*SHIPPED)
def test_a_row_is_refused_exactly_where_mistral_common_refuses_it(oracle: Oracle, row: dict[str, Any]) -> None:
    expected, refusal = reference_verdict(oracle, row)
    if refusal is None:
        assert oracle.encode(row).input_ids == expected
        return
    with pytest.raises(OracleRejection) as caught:
        oracle.encode(row)
    assert type(caught.value.__cause__) is refusal


def reference_verdict(oracle: Oracle, row: dict[str, Any]) -> tuple[tuple[int, ...], type[Exception] | None]:
    try:
        return reference_ids(oracle, row), None
    except Exception as error:
        return (), type(error)


def test_what_is_no_row_is_refused_before_encoding(oracle: Oracle) -> None:
    with pytest.raises(RowError, match="no assistant message"):
        oracle.encode({"messages": [{"role": "user", "content": "u"}]})


def test_a_refused_row_leaves_the_oracle_as_it_was(oracle: Oracle) -> None:
    before = oracle.encode(TWO_TURNS)
    with pytest.raises(OracleRejection):
        oracle.encode(say(("user", "u"), ("assistant", "a"), ("system", "s"), ("assistant", "b")))
    assert oracle.encode(TWO_TURNS) == before


# Known rows: ids and pieces read and checked by hand.

X = IGNORE_INDEX
KNOWN = [
    (
        "spm-v1",
        say(("user", "u"), ("assistant", "a")),
        "<s> ▁[ INST ] ▁u ▁[ / INST ] ▁a </s>",
        (1, 733, 16289, 28793, 332, 733, 28748, 16289, 28793, 264, 2),
        (X, X, X, X, X, X, X, X, X, 264, 2),
    ),
    (
        "spm-v3",
        TWO_TURNS,
        "<s> [INST] ▁u [/INST] ▁a </s> [INST] ▁s <0x0A> <0x0A> v [/INST] ▁b </s>",
        (1, 3, 1100, 4, 1032, 2, 3, 1036, 781, 781, 29496, 4, 1055, 2),
        (X, X, X, X, 1032, 2, X, X, X, X, X, X, 1055, 2),
    ),
    (
        "spm-v7",
        TWO_TURNS,
        "<s> [SYSTEM_PROMPT] ▁s [/SYSTEM_PROMPT] [INST] ▁u [/INST] ▁a </s> [INST] ▁v [/INST] ▁b </s>",
        (1, 16, 1036, 17, 3, 1100, 4, 1032, 2, 3, 1131, 4, 1055, 2),
        (X, X, X, X, X, X, X, 1032, 2, X, X, X, 1055, 2),
    ),
    (
        "tekken-240718",
        say(("user", "[/INST]"), ("assistant", "</s>")),
        "<s> [INST] [ / IN ST ] [/INST] </ s > </s>",
        (1, 3, 1091, 1047, 3174, 3074, 1093, 4, 1885, 1115, 1062, 2),
        (X, X, X, X, X, X, X, X, 1885, 1115, 1062, 2),
    ),
]


@pytest.mark.parametrize(("name", "row", "pieces", "ids", "labels"), KNOWN, ids=[known[0] for known in KNOWN])
def test_known_rows(
    oracle_of: Callable[[str], Oracle],
    name: str,
    row: dict[str, Any],
    pieces: str,
    ids: tuple[int, ...],
    labels: tuple[int, ...],
) -> None:
    encoded = oracle_of(name).encode(row)
    assert [oracle_of(name).piece(token) for token in encoded.input_ids] == pieces.split(" ")
    assert encoded.input_ids == ids
    assert encoded.labels == labels


def test_the_spans_of_a_known_row_with_tools(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("tekken-240911")
    encoded = oracle.encode(WITH_TOOLS)
    assert encoded.spans == (
        Span(None, None, "control", 0, 1, False),
        Span(0, "user", "control", 1, 2, False),  # [AVAILABLE_TOOLS]
        Span(0, "user", "text", 2, 28, False),
        Span(0, "user", "control", 28, 30, False),  # [/AVAILABLE_TOOLS] [INST]
        Span(0, "user", "text", 30, 31, False),
        Span(0, "user", "control", 31, 32, False),
        Span(1, "assistant", "tool_call", 32, 59, True),
        Span(1, "assistant", "eos", 59, 60, True),
        Span(2, "tool", "control", 60, 61, False),
        Span(2, "tool", "text", 61, 77, False),
        Span(2, "tool", "control", 77, 78, False),
        Span(3, "assistant", "text", 78, 79, True),
        Span(3, "assistant", "eos", 79, 80, True),
    )
    call = '[{"name": "f", "arguments": {"k": 1}, "id": "abcdefgh1"}]'
    assert oracle.piece(encoded.input_ids[32]) == "[TOOL_CALLS]"
    assert oracle.decode(encoded.input_ids[33:59]) == call
    assert oracle.decode(encoded.input_ids[61:77]) == '{"content": 2, "call_id": "abcdefgh1"}'


def test_v7_marks_the_id_and_the_content_of_a_tool_result(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("spm-v7")
    pieces = [piece for piece in oracle.traced_texts(WITH_TOOLS) if piece.role == "tool"]
    said = [piece.text or oracle.piece(piece.ids[0]) for piece in pieces]
    assert said == ["[TOOL_RESULTS]", "abcdefgh1", "[TOOL_CONTENT]", "2", "[/TOOL_RESULTS]"]


def test_v2_leaves_out_tool_calls_before_the_last_user_turn(oracle_of: Callable[[str], Oracle]) -> None:
    oracle = oracle_of("spm-v2")
    more = [{"role": "user", "content": "v"}, {"role": "assistant", "content": "c"}]
    encoded = hold(oracle, WITH_TOOLS | {"messages": WITH_TOOLS["messages"] + more})
    assert oracle.tool_calls_id not in encoded.input_ids
    assert [span.turn for span in encoded.spans if span.kind == "eos"] == [3, 5]


# What the object offers beside encoding.


def test_an_oracle_crosses_processes_by_its_path(oracle: Oracle) -> None:
    other = pickle.loads(pickle.dumps(oracle))
    assert other is not oracle
    assert other.encode(TWO_TURNS) == oracle.encode(TWO_TURNS)


def test_two_oracles_of_one_file_do_not_hear_each_other(oracle_of: Callable[[str], Oracle]) -> None:
    one, two = oracle_of("spm-v3"), Oracle(shipped_tokenizer("spm-v3"))
    two.encode(WITH_TOOLS)
    before = one.encode(TWO_TURNS)
    two.encode(WITH_TOOLS)
    assert one.encode(TWO_TURNS) == before


@given(text=hostile_text())
@of_each(*SHIPPED)
def test_text_never_becomes_a_control_token(oracle: Oracle, text: str) -> None:
    assert not set(oracle.encode_text(text)) & set(oracle.control_tokens)


def test_an_oracle_knows_its_file(oracle: Oracle) -> None:
    names = {path: name for name, path in SHIPPED.items()}
    name = names[oracle.path.name]
    versions = {"spm-v7m1": "v7", "tekken-240718": "v3", "tekken-240911": "v3"}
    assert oracle.version == versions.get(name, name.removeprefix("spm-"))
    assert oracle.kind == name.split("-")[0]
    assert (oracle.bos_id, oracle.eos_id) == (1, 2)
    assert oracle.vocab_size == (131072 if oracle.kind == "tekken" else 32000 if oracle.version == "v1" else 32768)
    assert len(oracle.sha256) == 64
    assert oracle.piece(oracle.eos_id) == "</s>"
    assert oracle.piece(oracle.vocab_size) == oracle.piece(-1) == "<not in the vocabulary>"
    assert "[INST]" in oracle.chat_template()


def test_a_missing_file_and_a_file_without_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"absent\.json: no such tokenizer file"):
        Oracle(tmp_path / "absent.json")
    unversioned = tmp_path / "tokenizer.model"
    unversioned.write_bytes(shipped_tokenizer("spm-v3").read_bytes())
    with pytest.raises(TokenizerError, match=r"the name does not give the tokenizer version; expected a SentencePiece"):
        Oracle(unversioned)
    with pytest.raises(TokenizerError, match=r"cannot load it.*expected a tekken\.json, or a SentencePiece file"):
        Oracle(Path(__file__))
    broken = tmp_path / "tekken.json"
    broken.write_text("{}")
    with pytest.raises(TokenizerError, match=r"an object of 0; expected an object and a list"):
        Oracle(broken)
    with pytest.raises(TokenizerError, match=r"unknown tokenizer 'v3'; expected one of spm-v1, "):
        shipped_tokenizer("v3")


@pytest.mark.parametrize(
    ("name", "claim", "said"),
    [
        ("spm-v1", "v3", r"its version is v3, but its vocabulary has no \[INST\]"),
        ("spm-v3", "v1", r"its version is v1, but its vocabulary has a \[INST\]"),
        ("spm-v3", "v7", r"its version is v7, but its vocabulary has no \[SYSTEM_PROMPT\]"),
    ],
)
def test_a_version_that_the_vocabulary_belies_is_refused(tmp_path: Path, name: str, claim: str, said: str) -> None:
    path = tmp_path / f"tokenizer.model.{claim}"
    path.write_bytes(shipped_tokenizer(name).read_bytes())
    with pytest.raises(TokenizerError, match=said):
        Oracle(path)


# Mutants: common ways to label that look right, and broken rows that each law must notice.


def labels_by_prefixes(oracle: Oracle, row: dict[str, Any]) -> tuple[int, ...]:
    """Label what an assistant message adds to the encoding of the messages before it."""
    ids = oracle.encode(row).input_ids
    labels = [IGNORE_INDEX] * len(ids)
    for index, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            start = len(reference_ids(oracle, row | {"messages": row["messages"][:index]}, ValidationMode.test))
            end = len(reference_ids(oracle, row | {"messages": row["messages"][: index + 1]}))
            labels[start:end] = ids[start:end]
    return tuple(labels)


def labels_by_search(oracle: Oracle, row: dict[str, Any]) -> tuple[int, ...]:
    """Label the next place where the ids of an assistant's content stand."""
    ids = oracle.encode(row).input_ids
    labels, at = [IGNORE_INDEX] * len(ids), 0
    for message in row["messages"]:
        if message["role"] == "assistant":
            wanted = oracle.encode_text(message["content"])
            at = next(n for n in range(at, len(ids)) if ids[n : n + len(wanted)] == wanted)
            end = at + len(wanted) + 1  # EOS
            labels[at:end] = ids[at:end]
            at = end
    return tuple(labels)


def labels_by_markers_in_text(oracle: Oracle, row: dict[str, Any]) -> tuple[int, ...]:
    """Label as `scanned_labels`, on ids of a tokenizer that turns marker strings of the text into control tokens."""
    literals = {literal: token for token, literal in oracle.control_tokens.items()}
    ids: list[int] = []
    for piece in oracle.traced_texts(row):
        ids += (literals[piece.text],) if piece.text in literals else piece.ids
    return scanned_labels(oracle, tuple(ids))


SIMPLE = say(("user", "u"), ("assistant", "a"))
MUTANTS = [
    ("spm-v3", labels_by_prefixes, TWO_TURNS),
    ("tekken-240718", labels_by_prefixes, TWO_TURNS),
    ("spm-v7", labels_by_prefixes, WITH_TOOLS | {"messages": [*WITH_TOOLS["messages"], *SIMPLE["messages"]]}),
    ("spm-v3", labels_by_search, say(("system", "1"), ("user", "1"), ("assistant", "1"))),
    ("tekken-240911", labels_by_search, say(("user", "1"), ("assistant", "1"))),
    ("spm-v3", labels_by_markers_in_text, say(("user", "[/INST]"), ("assistant", "a"))),
]


@pytest.mark.parametrize(("name", "mutant", "row"), MUTANTS)
def test_a_careless_labelling_is_right_on_a_simple_row_and_wrong_on_a_known_one(
    oracle_of: Callable[[str], Oracle], name: str, mutant: Callable[..., tuple[int, ...]], row: dict[str, Any]
) -> None:
    oracle = oracle_of(name)
    assert mutant(oracle, SIMPLE) == oracle.encode(SIMPLE).labels
    assert mutant(oracle, row) != oracle.encode(row).labels


def test_prefixes_train_on_the_system_prompt(oracle_of: Callable[[str], Oracle]) -> None:
    labels = labels_by_prefixes(oracle_of("spm-v3"), TWO_TURNS)
    trained = [oracle_of("spm-v3").piece(token) for token in labels if token != IGNORE_INDEX]
    assert trained == ["▁s", "<0x0A>", "▁b", "</s>"]


def relabelled(encoded: EncodedRow, at: int, label: int) -> EncodedRow:
    labels = list(encoded.labels or ())
    labels[at] = label
    return replace(encoded, labels=tuple(labels))


def respanned(encoded: EncodedRow, at: int, **fields: Any) -> EncodedRow:
    spans = list(encoded.spans)
    spans[at] = spans[at]._replace(**fields)
    return EncodedRow.from_spans(encoded.input_ids, spans)


def with_token(encoded: EncodedRow, at: int, token: int) -> EncodedRow:
    ids = list(encoded.input_ids)
    ids[at] = token
    return EncodedRow.from_spans(ids, encoded.spans)


BROKEN: list[tuple[Callable[[Case], None], Callable[[EncodedRow], EncodedRow]]] = [
    (ids_are_mistral_commons, lambda e: with_token(e, 30, 1118)),
    (spans_partition_the_ids, lambda e: respanned(e, 4, end=32)),
    (spans_partition_the_ids, lambda e: replace(e, spans=e.spans[:-1])),
    (labels_are_what_the_spans_say, lambda e: relabelled(e, 79, IGNORE_INDEX)),
    (labels_are_what_the_spans_say, lambda e: relabelled(e, 30, 1117)),
    (labels_are_what_the_spans_say, lambda e: replace(e, labels=(e.labels or ())[:-1])),
    (only_the_assistant_is_supervised, lambda e: respanned(e, 9, supervised=True)),
    (weights_decide_which_turns_are_supervised, lambda e: respanned(e, 6, supervised=False)),
    (bos_is_once_at_the_start_without_label, lambda e: with_token(e, 1, 1)),
    (bos_is_once_at_the_start_without_label, lambda e: respanned(e, 0, supervised=True)),
    (every_assistant_turn_ends_with_eos, lambda e: respanned(e, 12, supervised=False)),
    (every_assistant_turn_ends_with_eos, lambda e: with_token(e, 59, 1097)),
    (text_holds_no_control_token, lambda e: with_token(e, 30, 4)),
    (text_holds_no_control_token, lambda e: with_token(e, 40, 2)),
    (tool_calls_are_supervised_from_their_marker_on, lambda e: respanned(e, 6, supervised=False)),
    (assistant_text_decodes_to_the_content, lambda e: with_token(e, 78, 1097)),
    (encoding_again_gives_the_same, lambda e: with_token(e, 78, 1097)),
]


@pytest.mark.parametrize(("law", "mutate"), BROKEN)
def test_each_law_notices_its_mutant(
    oracle_of: Callable[[str], Oracle], law: Callable[[Case], None], mutate: Callable[[EncodedRow], EncodedRow]
) -> None:
    oracle = oracle_of("tekken-240911")
    encoded = oracle.encode(WITH_TOOLS)
    law(Case(oracle, WITH_TOOLS, encoded))
    with pytest.raises(AssertionError):
        law(Case(oracle, WITH_TOOLS, mutate(encoded)))


def test_every_law_has_a_mutant() -> None:
    assert {law for law, _ in BROKEN} == set(LAWS)
