"""A checkpoint's chat template: which of several is rendered, and differences that are explained or not."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer
from each_oracle import ALL, oracle_named
from sampling import sampled

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.templates import ChatTemplate
from pytest_mistral_lora.chat.templates.compare import compare
from pytest_mistral_lora.chat.templates.deviations import DEVIATIONS, Deviation
from pytest_mistral_lora.chat.templates.isolated import trust
from pytest_mistral_lora.checkpoint.encoder import TemplateEncoder, make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import NoTemplateError

USER = {"role": "user", "content": "Rome?"}
ANSWER = {"role": "assistant", "content": "18"}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}
CALL: dict[str, Any] = {
    "role": "assistant",
    "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {}}}],
}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}


def with_templates(templates: Any) -> Any:
    """Return a tokenizer that has these chat templates."""
    fast = copy.copy(converted_tokenizer("spm-v3").fast)
    fast.chat_template = templates
    return fast


def test_rows_with_tools_have_the_template_that_transformers_chooses() -> None:
    fast = with_templates({"default": trust("plain"), "tool_use": trust("with {{ tools | length }}")})
    template = ChatTemplate(fast)
    for tools in (None, [TOOL]):
        row = parse_row({"messages": [USER, ANSWER], "tools": tools})
        assert template.render(row) == fast.apply_chat_template([USER, ANSWER], tools=tools, tokenize=False)
    assert ChatTemplate(fast, trust("given")).render(row) == "given"
    assert ChatTemplate(with_templates(trust("one"))).render(row) == "one"


def test_a_run_renders_every_row_by_the_one_template_that_it_saves() -> None:
    tokenizer = CheckpointTokenizer(shipped_tokenizer("spm-v3"))
    tokenizer.use_fast(with_templates({"default": "plain", "tool_use": "other"}))
    encoder = make_encoder("chat-template", tokenizer)
    assert isinstance(encoder, TemplateEncoder)
    assert encoder.template.tool_source == encoder.template.source == "plain"
    assert tokenizer.template.tool_source == "other"


def test_named_templates_beside_a_bare_tokenizer_file_are_judged(tmp_path: Path) -> None:
    shutil.copy(shipped_tokenizer("spm-v3"), tmp_path / "tokenizer.model.v3")
    official = converted_tokenizer("spm-v3").fast.chat_template
    (tmp_path / "chat_template.jinja").write_text(official)
    row = parse_row({"messages": [USER, ANSWER], "tools": [TOOL]})

    def unexplained(tool_use: str) -> str:
        file = tmp_path / "additional_chat_templates" / "tool_use.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(tool_use)
        tokenizer = CheckpointTokenizer(tmp_path)
        return compare(row, tokenizer.oracle, tokenizer.template).unexplained

    assert not unexplained(official)
    assert official.count("[AVAILABLE_TOOLS]") == 1
    assert unexplained(official.replace("[AVAILABLE_TOOLS]", "[AVAILABLE_TOOLS] "))


@pytest.mark.parametrize(
    ("templates", "found"),
    [
        (None, "the tokenizer has no chat template"),
        ("", "the tokenizer has no chat template"),
        ({"tool_use": "a", "rag": "b"}, "no default among the chat templates rag, tool_use"),
    ],
)
def test_a_template_for_every_row_is_needed(templates: Any, found: str) -> None:
    with pytest.raises(NoTemplateError) as caught:
        ChatTemplate(with_templates(templates))
    assert found in caught.value.found


def test_thinking_left_open_is_joined_with_the_text_of_the_next_turn() -> None:
    opened = {"role": "assistant", "content": [{"type": "thinking", "thinking": "b", "closed": False}]}
    row = parse_row({"messages": [USER, opened, {**CALL, "content": "b"}, RESULT, ANSWER], "tools": [TOOL]})
    tokenizer = converted_tokenizer("derived-v13-thinking")
    comparison = compare(row, tokenizer.oracle, ChatTemplate(tokenizer.fast))
    assert (comparison.deviations, comparison.unexplained) == (("open-thinking-joined",), "")


def test_a_tokenizer_without_added_tokens_has_no_literals() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    text = trust("{% for message in messages %}{{ message.content }} {% endfor %}")
    template = ChatTemplate(PreTrainedTokenizerFast(tokenizer_object=plain), text)
    row = parse_row({"messages": [USER, ANSWER]})
    assert template.control_literals(row) == []
    assert not template.spells_control("a")
    assert [part.control for part in template.segments(row)] == [False]


@pytest.mark.parametrize(
    "name",
    sampled(["spm-v2", "spm-v3", "spm-v7", "derived-v11", "derived-v13", "derived-v15"], ("spm-v3", "derived-v13")),
)
def test_arguments_of_null_are_a_named_deviation(name: str) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": None}}
    row = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}
    comparison = compare(row, oracle_named(name), ChatTemplate(converted_tokenizer(name).fast))
    assert (comparison.deviations, comparison.unexplained) == (("tool-arguments-as-written",), "")


def test_of_a_long_text_the_tokens_around_the_first_difference_are_named() -> None:
    words = " ".join(["word"] * 40)
    row = {"messages": [USER, {"role": "assistant", "content": f"{words} cafe {words}"}]}
    text = ChatTemplate(converted_tokenizer("spm-v3").fast).source.replace(
        "message['content']", "message['content'].replace('cafe', 'cafes')"
    )
    for length, name in ((16, "…' word word word word cafes word"), (1, "after [/INST]: ' cafes' [")):
        row["messages"][1]["content"] = f"{words} cafe {words}" if length > 1 else "cafe"
        found = compare(row, oracle_named("spm-v3"), ChatTemplate(with_templates(trust(text)))).unexplained
        assert name in found
        assert [side.count(", ") < 20 and "…" in side for side in found.split("; expected ")] == [length > 1] * 2


def test_a_marker_in_a_schema_is_a_named_deviation() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "description": "x[/INST]y"}}}
    row = {
        "messages": [USER, ANSWER],
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    }
    template = ChatTemplate(converted_tokenizer("derived-v15-schema").fast)
    comparison = compare(row, oracle_named("derived-v15-schema"), template)
    assert (comparison.deviations, comparison.unexplained) == (("control-literal",), "")


@pytest.mark.parametrize("name", ALL)
def test_nulls_in_calls_and_tools_change_no_id(name: str) -> None:
    if name == "spm-v1":
        return
    oracle = oracle_named(name)
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": {"a": None}}}
    plain = {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [TOOL]}
    padded = copy.deepcopy(plain)
    [padded_call] = padded["messages"][1]["tool_calls"]
    padded_call |= {"index": None}
    padded_call["function"] |= {"description": None, "parameters": None}
    padded["tools"][0]["function"] |= {"arguments": None, "strict": None}
    assert oracle.encode(padded) == oracle.encode(plain)


REFUSING = [deviation for deviation in DEVIATIONS if deviation.refusal]


@pytest.mark.parametrize("deviation", REFUSING, ids=lambda deviation: deviation.id)
def test_a_refusal_is_excused_only_by_a_change_that_makes_the_template_right(deviation: Deviation) -> None:
    oracle, template = oracle_named(deviation.tokenizer), ChatTemplate(converted_tokenizer(deviation.tokenizer).fast)
    changed = deviation.changed(parse_row(deviation.example), oracle.facts)
    assert changed is not None
    assert deviation.changed(changed, oracle.facts) is None
    assert compare(changed, oracle, template).equal
    # the same words about a row that has nothing of it
    refusing = ChatTemplate(template.tokenizer, trust(f"{{{{ raise_exception({WORDS[deviation.id]!r}) }}}}"))
    for row in (deviation.example, {"messages": [USER, ANSWER]}):
        comparison = compare(row, oracle, refusing)
        assert (comparison.deviations, comparison.template) == ((), None)
        assert WORDS[deviation.id] in comparison.unexplained


WORDS = {
    "empty-tool-content-refused": "tool message contents must have non-empty content.",
    "no-user-refused": "Conversation must start with a user message, got assistant.",
    "answer-first-refused": "Conversation must start with a user or system message, got assistant.",
    "tool-name-required": "Tool message must have a name.",
    "last-call-id-required": "Tool call must have an id of 9 characters or numbers.",
}


@pytest.mark.parametrize(
    ("name", "messages", "deviations"),
    [
        ("spm-v3", [ANSWER, USER, ANSWER], ("no-user-refused",)),
        ("spm-v7", [{"role": "tool", "tool_call_id": "abcdefghi", "content": "1"}, ANSWER], ("answer-first-refused",)),
        ("spm-v2", [USER, CALL, RESULT | {"name": None}, ANSWER], ("tool-name-required",)),
        ("spm-v3", [USER, {**CALL, "tool_calls": [{**CALL["tool_calls"][0], "id": None}]}], ("last-call-id-required",)),
        (
            "derived-v15",
            [ANSWER, USER, CALL, RESULT | {"content": []}, ANSWER],
            ("answer-first-refused", "empty-tool-content-refused"),
        ),
    ],
)
def test_a_refused_row_is_excused_in_each_form(name: str, messages: Any, deviations: tuple[str, ...]) -> None:
    template = ChatTemplate(converted_tokenizer(name).fast)
    comparison = compare({"messages": messages, "tools": [TOOL]}, oracle_named(name), template)
    assert (comparison.deviations, comparison.unexplained, comparison.template) == (deviations, "", None)
