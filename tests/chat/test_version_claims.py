"""Errors name the tokenizers that would take a row: these do take it, and the one that refuses it is none of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import derived_tokenizer
from each_oracle import ALL, oracle_named

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.errors import OracleRejection

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
THOUGHT = [{"type": "thinking", "thinking": "t"}, {"type": "text", "text": "x"}]
IDS = ("abcdefgh1", "abcdefgh2")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def calls(*ids: str, **fields: Any) -> dict[str, Any]:
    made = [{"id": one, "type": "function", "function": {"name": "f", "arguments": {}}} for one in ids]
    return {"role": "assistant", "tool_calls": made, **fields}


def results(*ids: str) -> list[dict[str, Any]]:
    return [{"role": "tool", "content": "r", "tool_call_id": one} for one in ids]


ROWS: dict[str, dict[str, Any]] = {
    "thinking of the system": {"messages": [{"role": "system", "content": THOUGHT}, USER, ANSWER]},
    "thinking of the assistant": {"messages": [USER, {"role": "assistant", "content": THOUGHT}]},
    "thinking before a call": {"messages": [USER, calls(IDS[0], content=THOUGHT[:1]), *results(IDS[0]), ANSWER]},
    "thinking of both": {
        "messages": [{"role": "system", "content": THOUGHT}, USER, {"role": "assistant", "content": THOUGHT}]
    },
    "a text and a call in one turn": {"messages": [USER, ANSWER, calls(IDS[0]), *results(IDS[0]), ANSWER]},
    "a call": {"messages": [USER, calls(IDS[0]), *results(IDS[0]), ANSWER]},
    "two calls": {"messages": [USER, calls(*IDS), *results(*IDS), ANSWER]},
    "tools": {"messages": [USER, ANSWER], "tools": [TOOL]},
    "a reasoning effort": {"messages": [USER, ANSWER], "reasoning_effort": "high"},
}


def without_efforts(data: dict[str, Any]) -> None:
    data["model_settings_builder"]["reasoning_effort"] = None


def without_thinking(data: dict[str, Any]) -> None:
    for token in data["special_tokens"]:
        token["token_str"] = token["token_str"].replace("THINK", "SINK")


@pytest.fixture(scope="module")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Oracle]:
    """Return every tokenizer, and two of the newest version that lack a part which it may have."""

    def lacking(change: Callable[[dict[str, Any]], None]) -> Oracle:
        data = json.loads(derived_tokenizer("derived-v15").read_text("utf-8"))
        change(data)
        path: Path = tmp_path_factory.mktemp("v15") / "tekken.json"
        path.write_text(json.dumps(data), "utf-8")
        return Oracle(path)

    newest = {"v15 without efforts": lacking(without_efforts), "v15 without thinking": lacking(without_thinking)}
    return {name: oracle_named(name) for name in ALL} | newest


def takes(oracle: Oracle, row: dict[str, Any]) -> str:
    """Return nothing if a tokenizer takes a row, else its refusal."""
    try:
        oracle.encode(row)
    except OracleRejection as error:
        return str(error)
    return ""


def is_named(oracle: Oracle, refusal: str) -> bool:
    """Return whether a tokenizer is one of those that a refusal names."""
    claim = re.search(r"a tokenizer (?P<how>from|of) v(?P<version>\d+)", refusal)
    assert claim, refusal
    number, version = int(oracle.version.removeprefix("v")), int(claim["version"])
    named = number >= version if claim["how"] == "from" else number == version
    if "that has [THINK] and [/THINK]" in refusal:
        named = named and "[THINK]" in oracle.control_tokens.values()
    return named


@pytest.mark.parametrize("name", ROWS)
def test_the_tokenizers_that_a_refusal_names_are_those_that_take_the_row(name: str, oracles: dict[str, Oracle]) -> None:
    refusals = {one: refusal for one, oracle in oracles.items() if (refusal := takes(oracle, ROWS[name]))}
    assert refusals
    assert len(refusals) < len(oracles)
    for refuser, refusal in refusals.items():
        # v1 has no tools at all, which is said first: the turn may need more
        if refuser == "spm-v1" and "does not have" in refusal and name != "a call":
            continue
        named = {one for one, oracle in oracles.items() if is_named(oracle, refusal)}
        assert named == oracles.keys() - refusals.keys(), refusal
