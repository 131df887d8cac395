"""Every field of mistral-common's request is honoured, known to change no id, or refused by name."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from derived_tekken import derived_oracle
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import FinetuningMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest, InstructRequest
from pydantic import BaseModel

from pytest_mistral_lora.chat.fields import REFUSED_KEYS, ROW_KEYS
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.errors import OracleRejection, RowError
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import rows

USER = {"role": "user", "content": "A city, please."}
ANSWER = {"role": "assistant", "content": '{"city": "Rome"}'}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}
SCHEMA = {"type": "object", "properties": {"unit": {"type": "string"}, "city": {"type": "string"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}

HONOURED = {
    "SystemMessage": {"role", "content"},
    "UserMessage": {"role", "content"},
    "FinetuningAssistantMessage": {"role", "content", "tool_calls", "weight"},
    "ToolMessage": {"role", "content", "tool_call_id", "name"},
    "ToolCall": {"id", "type", "function"},
    "FunctionCall": {"name", "arguments"},
    "Tool": {"type", "function"},
    "Function": {"name", "description", "parameters", "strict"},
    "TextChunk": {"type", "text"},
    "ThinkChunk": {"type", "thinking", "closed"},
    "ResponseFormat": {"type", "json_schema"},
    "JsonSchema": {"name", "description", "schema", "strict"},
}
REFUSED = {
    "FinetuningAssistantMessage": {"prefix"},
    # text only
    **{f"{kind}Chunk": {"type", key} for kind, key in (("Image", "image"), ("ImageURL", "image_url"))},
    **{f"{kind}Chunk": {"type", key} for kind, key in (("Audio", "input_audio"), ("AudioURL", "audio_url"))},
    "ImageURL": {"url", "detail"},
    "AudioURL": {"url"},
}
IGNORED_KEYS = {"model", "temperature", "top_p", "max_tokens", "random_seed", "tool_choice", "parallel_tool_calls"}
"""A server reads them when it generates."""
CHANGES_NO_ID = {"NamedToolChoice": {"type", "function"}, "FunctionName": {"name"}}


def models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield every model that an annotation names, and those in its fields."""
    pending, seen = [annotation], []
    while pending:
        one = pending.pop()
        if inspect.isclass(one) and issubclass(one, BaseModel):
            if one in seen:
                continue
            seen.append(one)
            yield one
            pending += [field.annotation for field in one.model_fields.values()]
        pending += typing.get_args(one)
        if isinstance(one, typing.TypeVar):
            pending += [one.__bound__, *one.__constraints__]


def fields(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


REQUEST = ChatCompletionRequest[FinetuningMessage]
MODELS = [model for model in models(REQUEST) if model is not REQUEST]


def test_every_field_of_a_request_is_known() -> None:
    assert fields(REQUEST) | {"continue_final_message"} == {*ROW_KEYS, *IGNORED_KEYS, *REFUSED_KEYS}


def test_an_encoder_reads_nothing_that_a_row_does_not_set() -> None:
    known = {"messages", "system_prompt", "available_tools", "truncate_at_max_tokens", "settings"}
    assert fields(InstructRequest) == known


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_within_a_request_is_known(model: type[BaseModel]) -> None:
    name = model.__name__
    known = HONOURED.get(name, set()) | REFUSED.get(name, set()) | CHANGES_NO_ID.get(name, set())
    assert fields(model) <= known


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"continue_final_message": True}, "continue_final_message: True, which leaves out"),
        ({"truncate_for_context_length": True}, "truncate_for_context_length: True, which leaves out"),
        ({"messages": [USER, {**ANSWER, "prefix": True}]}, "messages[1].prefix: unknown field"),
        *(
            ({"messages": [{"role": "user", "content": [{"type": kind}]}, ANSWER]}, f"messages[0].content[0]{field}: ")
            for kind, field in (("image", ".type"), ("image_url", ".image_url"), ("input_audio", ""), ("audio_url", ""))
        ),
        ({"response_format": "json"}, "response_format: is a string"),
        ({"response_format": {"type": "json"}}, "response_format.type: 'json'"),
        ({"response_format": {"kind": "text"}}, "response_format.kind: unknown field"),
        ({"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema: is given"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema: is null"),
        ({"response_format": {**FORMAT, "json_schema": {"name": "a"}}}, "response_format.json_schema.schema: is null"),
        (
            {"response_format": {**FORMAT, "json_schema": {"name": "a", "custom_schema": {}}}},
            "response_format.json_schema.custom_schema: unknown field",
        ),
        (
            {"response_format": {**FORMAT, "json_schema": {"name": "a", "schema": {}, "strict": 1}}},
            "response_format.json_schema.strict: is a number",
        ),
        ({"response_formats": FORMAT}, "unknown key 'response_formats'; expected 'response_format'"),
    ],
)
def test_a_field_that_leaves_something_out_is_refused_by_name(change: dict[str, Any], place: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row({"messages": [USER, ANSWER], **change}, place=Place.of("rows.jsonl", 3))
    assert str(caught.value).startswith(("rows.jsonl:3, " + place, "rows.jsonl:3: " + place))


def test_a_schema_that_is_none_is_refused_with_its_field() -> None:
    bad = {**FORMAT, "json_schema": {"name": "a", "schema": {"type": "objekt"}}}
    row = parse_row({"messages": [USER, ANSWER], "response_format": bad}, place=Place.of("rows.jsonl", 3))
    with pytest.raises(OracleRejection, match="'objekt'") as caught:
        derived_oracle("derived-v15-schema").encode(row)
    assert str(caught.value.place) == "rows.jsonl:3, response_format.json_schema.schema"


def test_a_response_format_is_encoded_as_mistral_common_encodes_it() -> None:
    oracle = derived_oracle("derived-v15-schema")
    plain = {"messages": [USER, ANSWER]}
    encoded = {
        name: oracle.encode({**plain, "response_format": value}).input_ids
        for name, value in {
            "absent": None,
            "text": {"type": "text"},
            "object": {"type": "json_object", "json_schema": None},
            "schema": FORMAT,
            "nulls": {**FORMAT, "json_schema": {**FORMAT["json_schema"], "description": None, "strict": None}},
        }.items()
    }
    assert encoded["absent"] == encoded["text"] == oracle.encode(plain).input_ids
    assert encoded["schema"] == encoded["nulls"] != encoded["object"] != encoded["text"]
    assert '"properties": {"unit"' in oracle.decode(encoded["schema"])
    # a tokenizer without a builder for it does as mistral-common does: nothing
    for name in ("derived-v15", "derived-v13"):
        other = derived_oracle(name)
        assert other.encode({**plain, "response_format": FORMAT}).input_ids == other.encode(plain).input_ids


FORMATS = st.sampled_from([None, {"type": "text"}, {"type": "json_object"}, FORMAT])


@settings(max_examples=25)
@given(row=rows(efforts=("none", "low"), thinking=True, parallel=True), response_format=FORMATS)
def test_a_row_with_a_response_format_has_mistral_commons_ids(row: dict[str, Any], response_format: Any) -> None:
    oracle = derived_oracle("derived-v15-schema")
    asked = parse_row({**row, "response_format": response_format})
    assert oracle.encode(asked).input_ids == oracle.reference(asked)


@given(
    row=rows(),
    ignored=st.fixed_dictionaries(
        {}, optional={"temperature": st.just(0.1), "model": st.just("m"), "tool_choice": st.just("none")}
    ),
)
@settings(max_examples=10)
def test_fields_that_change_no_id_are_ignored(row: dict[str, Any], ignored: dict[str, Any]) -> None:
    assert parse_row(row | ignored) == parse_row(row)
