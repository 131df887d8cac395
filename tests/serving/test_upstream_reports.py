"""The reports of docs/upstream that one request to llama.cpp repeats, with a model that was not trained."""

from __future__ import annotations

import json
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import write_derived
from gguf_files import write_gguf
from llamacpp_process import BUILD, Post, converted_model, needs_llamacpp, served

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

pytestmark = [needs_llamacpp, pytest.mark.skipif(BUILD != "11549", reason="the reports are of build 11549")]

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
AS_WANTED = '[TOOL_CALLS]weather[ARGS][CALL_ID]abcdefgh1[ARGS]{"city": "Oslo"}'


@pytest.fixture(scope="module")
def post(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Post]:
    folder = tmp_path_factory.mktemp("v11")
    base = write_tiny_base(folder / "tiny", write_derived("derived-v11", folder, words=2000))
    with served(write_gguf(folder / "model.gguf", *converted_model(base, Oracle(base / "tekken.json")))) as (ask, _):
        yield ask


def said(post: Post, answer: str, **request: Any) -> dict[str, Any] | str:
    """Return what a client gets of an answer: a message, or the words of an error."""
    messages = [QUESTION, {"role": "assistant", "content": answer}]
    body = {"messages": messages, "tools": [TOOL], "max_tokens": 1, "logit_bias": [[2, 100.0]], **request}
    try:
        message: dict[str, Any] = post("/v1/chat/completions", body)["choices"][0]["message"]
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"
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


def test_the_reports_name_what_was_found_here() -> None:
    page = (Path(__file__).parents[2] / "docs" / "upstream" / "README.md").read_text(encoding="utf-8")
    for words in ("does not match the expected peg-native format", AS_ENCODED, BUILD):
        assert words in page
