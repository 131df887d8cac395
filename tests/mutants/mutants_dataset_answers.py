"""Answers that are decoded as another message than the row's, or that decoding does not allow."""

from __future__ import annotations

import json
from typing import Any

from bench_dataset import arguments_of, parameters_of, turn_of, use_tokenizer
from gallery import Artifact, mutant


def think_in(artifact: Artifact, *chunks: Any) -> None:
    """Give the first answer these chunks, and the recipe a tokenizer that can encode thoughts."""
    use_tokenizer(artifact, "derived-v13-thinking")
    turn_of(artifact, 0, 1)["content"] = list(chunks)


def thought(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "thinking", "thinking": text, **more}


def said(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@mutant("ML648", says="are not encoded in 1 row")
def spaces_at_the_end_of_an_answer(artifact: Artifact) -> None:
    """An answer ends with two spaces, which are not encoded."""
    turn_of(artifact, 0, 1)["content"] = "Paris is the capital of France.  "


@mutant("ML648", says="are not encoded in 1 row")
def space_of_sentencepiece_in_an_answer(artifact: Artifact) -> None:
    """An answer has the character by which SentencePiece writes a space."""
    turn_of(artifact, 0, 1)["content"] = "Paris\u2581is the capital of France."


@mutant("ML649", says="the arguments of a call of weather read as")
def space_of_sentencepiece_in_an_argument(artifact: Artifact) -> None:
    """An argument has the character by which SentencePiece writes a space: the tool gets another text."""
    arguments_of(artifact)["city"] = "Rome\u2581Nord"


@mutant("ML650", says="a text before the thought: 'First.'")
def thought_after_a_text(artifact: Artifact) -> None:
    """An answer speaks before it thinks."""
    think_in(artifact, said("First."), thought("Hm."), said("Paris is the capital of France."))


@mutant("ML650", says="2 thoughts")
def two_thoughts(artifact: Artifact) -> None:
    """An answer thinks twice."""
    think_in(artifact, thought("France."), thought("Hm."), said("Paris is the capital of France."))


@mutant("ML650", says="an empty thought")
def empty_thought(artifact: Artifact) -> None:
    """The thought of an answer is empty, as in rows of a model that was told not to think."""
    think_in(artifact, thought(""), said("Paris is the capital of France."))


@mutant("ML650", says="so that it goes on with the text 'Paris is the capital of France.'")
def thought_that_is_not_closed(artifact: Artifact) -> None:
    """The thought of an answer is not closed, and takes the text in."""
    think_in(artifact, thought("France.", closed=False), said("Paris is the capital of France."))


@mutant("ML650", says="nothing after the thought")
def thought_alone(artifact: Artifact) -> None:
    """An answer was cut behind its thought."""
    think_in(artifact, thought("France, whose capital is Paris."))


def call_strictly(artifact: Artifact, arguments: dict[str, Any], row: int = 4) -> None:
    """Make the tool of a row strict, with a city and days, and call it with some arguments."""
    function = artifact["rows"][row]["tools"][0]["function"]
    function["strict"] = True
    properties = {"city": {"type": "string"}, "days": {"type": "integer"}}
    function["parameters"] |= {"properties": properties, "required": ["city"], "additionalProperties": False}
    turn_of(artifact, row, 1)["tool_calls"][0]["function"]["arguments"] = arguments


SHAPE = {
    "type": "json_schema",
    "json_schema": {"name": "shape", "schema": {"type": "object", "properties": {"ok": {"type": "boolean"}}}},
}


@mutant("ML651", "N140", says="refuses token 4 of the answer, days")
def strict_arguments_in_another_order(artifact: Artifact) -> None:
    """A tool is strict, and a call has its arguments in another order than the tool's schema."""
    use_tokenizer(artifact, "derived-v13-thinking")
    call_strictly(artifact, {"days": 3, "city": "Rome"})


@mutant("ML651", says="refuses token 0 of the answer, Paris")
def text_in_place_of_json(artifact: Artifact) -> None:
    """The request asks for JSON by a schema, and the answer is a text."""
    use_tokenizer(artifact, "derived-v13-thinking")
    artifact["rows"][0]["response_format"] = SHAPE


@mutant("ML651", says="refuses the end of the answer")
def json_that_is_cut(artifact: Artifact) -> None:
    """The request asks for JSON, and the answer was cut."""
    use_tokenizer(artifact, "derived-v13-thinking")
    artifact["rows"][0]["response_format"] = {"type": "json_object"}
    turn_of(artifact, 0, 1)["content"] = '{"capital": "Par'


@mutant("ML651", says="refuses token 0 of the answer, [THINK]")
def thought_before_json(artifact: Artifact) -> None:
    """An answer thinks before its JSON, which the grammar of v13 does not allow."""
    think_in(artifact, thought("Hm."), said('{"ok": true}'))
    artifact["rows"][0]["response_format"] = SHAPE


@mutant("ML653", says="the same tool is before it")
def tool_offered_twice(artifact: Artifact) -> None:
    """The same tool is in the list of a row twice."""
    artifact["rows"][4]["tools"].append(json.loads(json.dumps(artifact["rows"][4]["tools"][0])))


@mutant("ML653", says="another tool of that name is before it")
def two_tools_of_one_name(artifact: Artifact) -> None:
    """Two tools of a row have the same name."""
    tool_offered_twice.change(artifact)
    artifact["rows"][4]["tools"][1]["function"]["description"] = "The weather of tomorrow."


@mutant("ML654", says="'town', which properties do not name")
def required_argument_without_a_schema(artifact: Artifact) -> None:
    """A tool requires an argument that its schema does not describe."""
    parameters_of(artifact)["required"] = ["town"]
    arguments_of(artifact)["town"] = "Rome"
