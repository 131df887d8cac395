"""Encoded preference records as trainers write them, by mistral-common alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from pytest_mistral_lora.chat.oracle import Oracle

Data = dict[str, Any]
Messages = Sequence[Data]

_CLASSES: dict[str, Any] = {
    "system": SystemMessage,
    "user": UserMessage,
    "tool": ToolMessage,
    "assistant": AssistantMessage,
}


@cache
def _reference(path: str, mode: ValidationMode) -> MistralTokenizer:
    return MistralTokenizer.from_file(path, mode=mode)


def ids_of(oracle: Oracle, messages: Messages, tools: Sequence[Data] | None, mode: ValidationMode) -> list[int]:
    """Return mistral-common's ids of some messages."""
    request: ChatCompletionRequest[Any] = ChatCompletionRequest(
        messages=[_CLASSES[message["role"]](**message) for message in messages],
        tools=[Tool(**tool) for tool in tools or ()] or None,
    )
    return list(_reference(str(oracle.path), mode).encode_chat_completion(request).tokens)


def answer_ids(
    oracle: Oracle, prompt: Messages, answer: Messages, tools: Sequence[Data] | None = None
) -> tuple[list[int], list[int]]:
    """Return mistral-common's ids of a prompt and of its answer: those of both together, cut behind the prompt."""
    before = ids_of(oracle, prompt, tools, ValidationMode.test)
    whole = ids_of(oracle, [*prompt, *answer], tools, ValidationMode.finetuning)
    assert whole[: len(before)] == before
    return before, whole[len(before) :]


def said(role: str, content: str) -> Data:
    return {"role": role, "content": content}


def pair(prompt: Messages, chosen: Messages, rejected: Messages, tools: Sequence[Data] | None = None) -> Data:
    """Return a pair of rows in TRL's form."""
    data: Data = {"prompt": [*prompt], "chosen": [*chosen], "rejected": [*rejected]}
    return data | {"tools": [*tools]} if tools else data


def texts_pair(question: str, chosen: str, rejected: str) -> Data:
    return pair([said("user", question)], [said("assistant", chosen)], [said("assistant", rejected)])


def with_ids(oracle: Oracle, row: Data) -> Data:
    """Return a pair with its ids, in the form of TRL's DPO."""
    sides = {name: answer_ids(oracle, row["prompt"], row[name], row.get("tools")) for name in ("chosen", "rejected")}
    [prompt] = {tuple(before) for before, _ in sides.values()}
    return row | {"prompt_ids": [*prompt]} | {f"{name}_ids": ids for name, (_, ids) in sides.items()}


def older(record: Data) -> Data:
    """Return a record of DPO or KTO with the names of older releases of TRL."""
    return {key.replace("_ids", "_input_ids"): value for key, value in record.items()}


def kto(record: Data) -> list[Data]:
    """Return the two records of a pair in the form of TRL's KTO; each has the other's answer for the KL term."""
    made = []
    for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
        shared = {key: record[key] for key in ("prompt", "tools", "prompt_ids") if key in record}
        answer = {"completion_ids": record[f"{name}_ids"], "KL_completion_ids": record[f"{other}_ids"]}
        made.append(shared | {"completion": record[name], "label": name == "chosen"} | answer)
    return made


def orpo(record: Data) -> Data:
    """Return a pair in the form of ORPO and CPO: whole sequences with labels."""
    made: Data = {key: record[key] for key in ("prompt", "chosen", "rejected", "tools") if key in record}
    made["prompt_input_ids"] = record["prompt_ids"]
    for name in ("chosen", "rejected"):
        ids = record[f"{name}_ids"]
        made[f"{name}_input_ids"] = record["prompt_ids"] + ids
        made[f"{name}_labels"] = [-100] * len(record["prompt_ids"]) + ids
        made[f"{name}_attention_mask"] = [1] * len(made[f"{name}_input_ids"])
    return made


def reward(record: Data) -> Data:
    """Return a pair in the form of a reward model: whole conversations without labels."""
    made: Data = {"tools": record["tools"]} if "tools" in record else {}
    for name in ("chosen", "rejected"):
        made[name] = record["prompt"] + record[name]
        made[f"{name}_ids"] = record["prompt_ids"] + record[f"{name}_ids"]
    return made


def without_texts(record: Data) -> Data:
    """Return a record with its ids and its label alone."""
    texts = ("prompt", "chosen", "rejected", "completion", "tools")
    return {key: value for key, value in record.items() if key not in texts}


def with_masks(oracle: Oracle, record: Data) -> Data:
    """Return a pair in the form of DPO with a mask beside each answer: 1 at the tokens of the assistant."""
    masks: Data = {}
    for name in ("chosen", "rejected"):
        messages = [
            message | {"weight": 0} if message["role"] == "assistant" else message for message in record["prompt"]
        ]
        row = {"messages": messages + record[name]}
        if "tools" in record:
            row["tools"] = record["tools"]
        labels = oracle.encode(row).labels or ()
        masks[f"{name}_mask"] = [int(label != -100) for label in labels[len(record["prompt_ids"]) :]]
    return record | masks
