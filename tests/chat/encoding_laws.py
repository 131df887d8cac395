"""The laws of an encoded row: mistral-common's own ids, and labels that its spans, weights and markers decide."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

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
from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import text_of, weight_of

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
