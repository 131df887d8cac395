"""Rows that are changed before they are encoded, and tokenizers that refuse others than mistral-common."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

from bench_mask import Made
from gallery import Artifact, mutant

from pytest_mistral_lora.chat.kinds.records import as_row
from pytest_mistral_lora.errors import OracleRejection


def said(row: Made, change: Callable[[str], str]) -> Made:
    """Change each text of a row."""
    messages = [
        message | {"content": change(message["content"])} if message.get("content") else message
        for message in row["messages"]
    ]
    return row | {"messages": messages}


def told(tool: Made, description: str) -> Made:
    """Describe a tool."""
    return tool | {"function": tool["function"] | {"description": description}}


def pasted(row: Made) -> Made:
    """Give arguments that are a string as a string within JSON, so that they are encoded as they are written."""
    messages = json.loads(json.dumps(row["messages"]))
    for message in messages:
        for call in message.get("tool_calls", ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return row | {"messages": messages}


def renamed(row: Made) -> Made:
    """Give the calls of a row the ids of the results, in order, as a trainer does that pairs them by place."""
    messages = json.loads(json.dumps(row["messages"]))
    results = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    for call, call_id in zip(calls, results, strict=False):
        call["id"] = call_id
    return row | {"messages": messages}


@mutant("ML107 ML108 ML109 ML112")
def _weights_in_the_text(artifact: Artifact) -> None:
    """The weight of an answer is written into the prompt."""
    question, answer = artifact["question"], artifact["answer"]
    artifact["row"] = {"messages": [question, answer | {"weight": 0}, question, answer]}
    artifact["before"] = lambda row: (
        row | {"messages": [m | {"content": f"{m['content']} {m.get('weight', '')}"} for m in row["messages"]]}
    )


@mutant("ML107 ML109", "I59")
def _answers_are_stripped(artifact: Artifact) -> None:
    """White space around an answer is stripped; Mistral strips spaces at its end only."""
    artifact["row"]["messages"][-1]["content"] = "\n  It is mild.\n"
    artifact["before"] = lambda row: said(row, str.strip)


@mutant("ML112")
def _another_prompt(artifact: Artifact) -> None:
    """The prompt at inference lacks BOS."""
    artifact["prompt"] = lambda row, tokenizer: tokenizer.encode_prompt(row)[1:]


@mutant("ML107 ML110 ML112")
def _arguments_are_pasted(artifact: Artifact) -> None:
    """Arguments that are a string are encoded as the text that they are."""
    artifact["before"] = pasted


@mutant("ML107 ML112")
def _strict_is_shown(artifact: Artifact) -> None:
    """The model is shown whether a tool is strict."""
    artifact["before"] = lambda row: (
        row | {"tools": [told(tool, str(tool["function"].get("strict"))) for tool in row["tools"]]}
    )


@mutant("ML107 ML112")
def _results_are_paired_by_place(artifact: Artifact) -> None:
    """Results are paired with calls by their place instead of their id."""
    artifact["tokenizer"] = artifact["newer_tokenizer"]
    artifact["before"] = renamed


@mutant("ML107", "I48", says="mistral-common raises nothing")
def _neighbours_are_refused(artifact: Artifact) -> None:
    """A second question straight after the first is refused."""
    artifact["row"] = {"messages": [artifact["question"], artifact["question"], artifact["answer"]]}

    def before(row: Made) -> Made:
        roles = [message["role"] for message in row["messages"]]
        if any(pair == ("user", "user") for pair in itertools.pairwise(roles)):
            raise OracleRejection("Conversation roles must alternate user/assistant/user/assistant/...")
        return row

    artifact["before"] = before


@mutant("ML107 ML112 ML118", "I12")
def _no_system_prompt(artifact: Artifact) -> None:
    """The system prompt is dropped."""
    artifact["before"] = lambda row: row | {"messages": [m for m in row["messages"] if m["role"] != "system"]}


@mutant("ML107 ML112", "I12")
def _the_system_prompt_in_the_first_question(artifact: Artifact) -> None:
    """The system prompt is put into the first question; version 3 has it beside the last."""

    def before(row: Made) -> Made:
        first, *rest = row["messages"]
        if first["role"] != "system":
            return row
        question = rest[0] | {"content": f"{first['content']}\n\n{rest[0]['content']}"}
        return row | {"messages": [question, *rest[1:]]}

    artifact["before"] = before


@mutant("ML107", "I14", says="InvalidFunctionCallException")
def _any_call_id_is_accepted(artifact: Artifact) -> None:
    """Ids of another form are rewritten into the accepted form, so you train on a row that no server takes."""
    messages = artifact["row"]["messages"]
    messages[4]["tool_calls"][0]["id"] = messages[6]["tool_call_id"] = "call_1"

    def before(row: Made) -> Made:
        return json.loads(json.dumps(row).replace('"call_1"', '"callcall1"'))

    artifact["before"] = before


@mutant("ML107", "I47", says="InvalidMessageStructureException is raised; mistral-common raises nothing")
def _validated_for_serving(artifact: Artifact) -> None:
    """Rows are validated for serving, and there no row ends with an answer."""
    tokenizer = artifact["tokenizer"]
    artifact["before"] = lambda row: tokenizer.chat_turns(as_row(row), as_prompt=True) and row


@mutant("ML107 ML109 ML112", says="mistral-common gives 12, and others from token 2 on")
def _texts_in_lower_case(artifact: Artifact) -> None:
    """All texts are changed to lower case before they are encoded."""
    question, answer = ("Which colour is the sky?", "Blue.")
    artifact["row"] = {
        "messages": [artifact["question"] | {"content": question}, artifact["answer"] | {"content": answer}]
    }
    artifact["before"] = lambda row: said(row, str.lower)


@mutant("ML107", "I58", says="builds a conversation in a way that this package does not know")
def _the_encoders_have_moved(artifact: Artifact) -> None:
    """mistral-common encodes messages with a method of an unknown name."""
    artifact["tokenizer"] = artifact["changed_tokenizer"]
