"""What the tests of vLLM and llama.cpp say that their parsers read of an answer, read here from its ids."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from each_oracle import oracle_named
from mistral_common.experimental.tools import InvalidToolCallError, _decode_tool_calls, _split_content_and_tool_calls

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.oracle.read_back import UnreadableIdsError, read_back

Data = dict[str, Any]
CASES: list[Data] = tomllib.loads((Path(__file__).parent / "parser_cases.toml").read_text(encoding="utf-8"))["case"]
QUESTION = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
MARKER = re.compile(r"(\[/?[A-Z_]+\])")


def ids_of_answer(case: Data, oracle: Oracle) -> tuple[int, ...]:
    """Return the ids of an answer, whose markers are control tokens."""
    controls = {text: number for number, text in oracle.control_tokens.items()}
    parts = [part for part in MARKER.split(case["answer"]) if part]
    return sum(((controls[part],) if part in controls else oracle.encode_text(part) for part in parts), ())


def answer_read(ids: tuple[int, ...], oracle: Oracle) -> Data:
    prompt = oracle.encode_prompt(QUESTION)
    message = read_back((*prompt, *ids, oracle.eos_id), oracle).messages[-1]
    content = message.get("content") or []
    chunks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {
        "content": "".join(chunk["text"] for chunk in chunks if chunk["type"] == "text"),
        "thinking": "".join(chunk["thinking"] for chunk in chunks if chunk["type"] == "thinking"),
        "calls": [as_read(call["function"], call["id"]) for call in message.get("tool_calls", ())],
    }


def as_read(function: Any, call_id: str) -> Data:
    return {"name": function["name"], "arguments": parsed(function["arguments"]), "id": call_id}


def parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


def expected(case: Data, read: Data) -> Data:
    """Return what the other parser reads; an id that it makes itself is not compared."""
    calls = [
        {"name": call["name"], "arguments": parsed(call["arguments"]), "id": call.get("id", found["id"])}
        for call, found in zip(case.get("calls", []), read["calls"], strict=False)
    ]
    return {"content": case.get("content", ""), "thinking": case.get("thinking", ""), "calls": calls}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['source']}-{case['name']}")
def test_the_answer_is_the_other_parsers_or_the_difference_is_named(case: Data) -> None:
    oracle = oracle_named(case["tokenizer"])
    ids = ids_of_answer(case, oracle)
    assert bool(case.get("why")) == (case["result"] != "same")
    if case["result"] == "refused":
        with pytest.raises(UnreadableIdsError):
            answer_read(ids, oracle)
        return
    read = answer_read(ids, oracle)
    same = read == expected(case, read) and len(read["calls"]) == len(case.get("calls", []))
    assert same == (case["result"] == "same"), read


def calls_of_mistral_common(case: Data) -> list[tuple[str, Any]]:
    oracle = oracle_named(case["tokenizer"])
    assert oracle.tool_calls_id is not None
    _, calls = _split_content_and_tool_calls(list(ids_of_answer(case, oracle)), oracle.tool_calls_id)
    return [(call.function.name, parsed(call.function.arguments)) for call in _decode_tool_calls(calls, oracle._text)]


@pytest.mark.parametrize("case", [case for case in CASES if case.get("calls")], ids=lambda case: case["name"])
def test_mistral_commons_decoder_reads_the_same_calls(case: Data) -> None:
    if case["result"] == "refused" or "mistral_common" in case:
        with pytest.raises(InvalidToolCallError):
            calls_of_mistral_common(case)
        return
    assert calls_of_mistral_common(case) == [(call["name"], parsed(call["arguments"])) for call in case["calls"]]
