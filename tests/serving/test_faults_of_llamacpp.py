"""The known faults of llama.cpp that one request repeats, with a model that was not trained."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import DERIVED, write_derived
from gguf_files import write_gguf
from llamacpp_process import BUILD, Post, converted_model, needs_llamacpp, served

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

pytestmark = [needs_llamacpp, pytest.mark.skipif(BUILD != "11549", reason="the facts are of build 11549")]

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = {"role": "user", "content": "Weather in Oslo?"}
AS_ENCODED = '[TOOL_CALLS]weather[CALL_ID]abcdefgh1[ARGS]{"city": "Oslo"}'
SAMPLERS = "400 Failed to initialize samplers: std::exception"
AS_WANTED = '[TOOL_CALLS]weather[ARGS][CALL_ID]abcdefgh1[ARGS]{"city": "Oslo"}'


SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
AS_JSON = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


@contextmanager
def untrained(name: str, folder: Path) -> Iterator[Post]:
    """Serve a model of a derived or a shipped tokenizer that was not trained."""
    source = write_derived(name, folder, words=2000) if name in DERIVED else shipped_tokenizer(name)
    base = write_tiny_base(folder / "tiny", source)
    with served(write_gguf(folder / "model.gguf", *converted_model(base, Oracle(source)))) as (ask, _):
        yield ask


@pytest.fixture(scope="module")
def post(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    with untrained("derived-v11", tmp_path_factory.mktemp("v11")) as ask:
        yield ask


def said(post: Post, answer: str, **request: Any) -> dict[str, Any] | str:
    """Return what a client gets of an answer: a message, or the words of an error."""
    messages = [QUESTION, {"role": "assistant", "content": answer}]
    body = {"messages": messages, "tools": [TOOL], "max_tokens": 1, "logit_bias": [[2, 100.0]], **request}
    try:
        message: dict[str, Any] = post("/v1/chat/completions", body)["choices"][0]["message"]
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.load(error)['error']['message']}"
    return message


def test_a_call_of_v11_as_it_is_encoded_is_an_error(post: Post) -> None:
    found = said(post, AS_ENCODED)
    assert isinstance(found, str)
    assert found.startswith("500 ")
    assert "does not match the expected peg-native format" in found


def test_a_call_of_v11_in_an_order_that_nobody_encodes_is_a_call(post: Post) -> None:
    found = said(post, AS_WANTED)
    assert isinstance(found, dict)
    [call] = found["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("weather", {"city": "Oslo"})
    assert call["id"] == "abcdefgh1"


def assert_a_prefill_is_refused_by_a_format_alone(post: Post, words: str) -> None:
    """Assert which fields of a request are refused beside an answer to go on with, and by which words."""
    json_object = {"type": "json_object"}
    for fields in ({"response_format": AS_JSON}, {"response_format": json_object}, {"json_schema": SCHEMA}):
        found = said(post, "It is", tools=[], **fields)
        assert isinstance(found, str), fields
        assert words in found, fields
    named = {"type": "function", "function": {"name": "weather"}}
    for fields in (
        *({"tool_choice": choice} for choice in ("auto", "none", "required", named)),
        {"tools": [], "response_format": {"type": "text"}},
        {"tools": [], "grammar": 'root ::= "a"'},
    ):
        assert isinstance(said(post, "It is", **fields), dict), fields


def test_an_answer_to_go_on_with_is_refused_beside_a_response_format_and_no_other_field(post: Post) -> None:
    assert_a_prefill_is_refused_by_a_format_alone(post, SAMPLERS)
    assert SAMPLERS in str(said(post, AS_ENCODED, tool_choice="required"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("derived-v13", SAMPLERS),
        ("derived-v13-thinking", SAMPLERS),
        ("derived-v15", SAMPLERS),
        ("derived-v7", "500 "),
        ("spm-v3", "500 "),
    ],
)
def test_the_same_of_other_templates(name: str, words: str, tmp_path: Path) -> None:
    with untrained(name, tmp_path) as post:
        assert_a_prefill_is_refused_by_a_format_alone(post, words)
        # tools beside a response format, and no answer to go on with
        body = {"messages": [QUESTION], "tools": [TOOL], "response_format": AS_JSON, "max_tokens": 1}
        try:
            post("/v1/chat/completions", body)
            found = ""
        except urllib.error.HTTPError as error:
            found = error.read().decode()
        assert ("failed to parse grammar" in found) is (words == SAMPLERS), found
