"""mistral-common's decoder and its grammar, by the known answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from derived_tekken import derived_oracle
from each_oracle import ALL, LAYOUTS, NEWER, oracle_named
from mistral_common.guidance.grammar_factory import GrammarFactory
from sampling import sampled

from pytest_mistral_lora.chat.answer_message import AnswerChunk, AnswerMessage, canonical_json
from pytest_mistral_lora.chat.oracle.answer_decoder import AnswerDecoder, UndecodableAnswerError
from pytest_mistral_lora.chat.oracle.answer_grammar import AnswerGrammar
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import LibraryError
from pytest_mistral_lora.records.known_answers import KnownAnswer, known_answers

ANSWERS = {answer.name: answer for answer in known_answers()}
GRAMMARS = ("derived-v11", "derived-v13", "derived-v13-thinking", "derived-v15", "derived-v15-schema")


def shown(message: AnswerMessage) -> list[Any]:
    calls = [(call.name, canonical_json(call.arguments), call.id) for call in message.calls]
    return [list(message.chunks), calls]


@pytest.mark.parametrize("name", sampled(ALL, [name for name in ALL if not name.startswith("tekken")]))
def test_each_known_answer_is_read_back(name: str) -> None:
    oracle = oracle_named(name)
    decoder = AnswerDecoder(oracle)
    for answer in ANSWERS.values():
        if answer.fits(oracle):
            ids = answer.answer_ids(oracle)
            assert shown(decoder.message(ids)) == shown(answer.message(oracle)), answer.name
            assert shown(decoder.message(ids[:-1])) == shown(answer.message(oracle)), answer.name


def test_a_thought_that_is_not_closed_takes_the_text_in() -> None:
    oracle = derived_oracle("derived-v13-thinking")
    ids = (oracle.control_ids["[THINK]"], *oracle.encode_text("One. Two."), oracle.eos_id)
    message = AnswerDecoder(oracle).message(ids)
    assert message.chunks == (AnswerChunk("One. Two.", is_thinking=True, is_closed=False),)
    assert (message.text, message.thinking) == ("", "One. Two.")


@pytest.mark.parametrize(
    "written",
    ['[TOOL_CALLS]weather{"city": "Oslo"}', '[TOOL_CALLS]weather[ARGS]{"city"', "[/THINK]text", "[THINK]a[THINK]b"],
)
def test_ids_without_a_message_are_refused(written: str) -> None:
    oracle = derived_oracle("derived-v13-thinking")
    ids: list[int] = []
    for part in written.replace("[", "\0[").replace("]", "]\0").split("\0"):
        ids += [oracle.control_ids[part]] if part in oracle.control_ids else oracle.encode_text(part) if part else []
    with pytest.raises(UndecodableAnswerError):
        AnswerDecoder(oracle).message(ids)


def test_arguments_that_are_no_json_stay_a_text() -> None:
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "put", "arguments": "{'a': 1}"}}
    message = AnswerMessage.of_turn([{"role": "assistant", "tool_calls": [call]}], oracle_named("spm-v3").facts)
    assert [call.arguments for call in message.calls] == ["{'a': 1}"]


def test_values_are_the_same_by_type_and_in_any_order() -> None:
    assert canonical_json({"a": 1, "b": [True]}) == canonical_json({"b": [True], "a": 1})
    assert len({canonical_json(value) for value in (1, 1.0, True, "1")}) == 4


@pytest.mark.parametrize("name", [*LAYOUTS, *NEWER])
def test_grammars_are_there_for_the_tokenizers_of_mistral_common(name: str) -> None:
    oracle = oracle_named(name)
    assert GrammarFactory.is_supported(oracle.library_tokenizer) is not bool(AnswerGrammar.unavailable(oracle))


REFUSED = {
    "derived-v11": {
        answer.name: "[CALL_ID]" for answer in ANSWERS.values() if answer.row.messages[-1].get("tool_calls")
    },
    "derived-v13-thinking": {"thinking-json-schema": "[THINK]"},
}
"""The known answers that the grammar of their own request refuses, with the token."""


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_grammar_refuses_the_known_answers_that_it_is_known_to_refuse(name: str) -> None:
    oracle = oracle_named(name)
    grammar = AnswerGrammar(oracle)
    found = {}
    for answer in ANSWERS.values():
        if answer.fits(oracle):
            refused = grammar.refused(answer.row, answer.answer_ids(oracle), answer.settings)
            if refused:
                found[answer.name] = refused.found
    assert found == {name: token for name, token in REFUSED.get(name, {}).items() if ANSWERS[name].fits(oracle)}


def strict(answer: KnownAnswer) -> Row:
    data = json.loads(answer.row.to_jsonl())
    for tool in data["tools"]:
        tool["function"]["strict"] = True
        tool["function"]["parameters"]["additionalProperties"] = False
    return Row.from_dict(data)


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("call", None, ""),
        pytest.param("call-two-arguments", None, "", marks=pytest.mark.slow),
        ("call-other-order", "days", "'city'"),
        pytest.param("call-further-argument", "unit", "'days'", marks=pytest.mark.slow),
        pytest.param("call-missing-argument", "days", "'city'", marks=pytest.mark.slow),
        ("call-unknown-tool", "ta", "'w"),
    ],
)
def test_a_strict_tool_fixes_names_keys_and_their_order(name: str, found: str | None, expected: str) -> None:
    oracle = derived_oracle("derived-v13", words=40_000)
    answer = ANSWERS[name]
    refused = AnswerGrammar(oracle).refused(strict(answer), answer.answer_ids(oracle))
    assert (refused.found if refused else None) == found
    assert expected in (refused.expected if refused else "")


def test_a_request_for_one_call_refuses_a_second() -> None:
    oracle = derived_oracle("derived-v13")
    grammar, answer = AnswerGrammar(oracle), ANSWERS["calls-of-two-tools"]
    refused = grammar.refused(answer.row, answer.answer_ids(oracle), {"parallel_tool_calls": False})
    assert refused is not None
    assert refused.found == "[TOOL_CALLS]"
    assert "the end of the answer" in refused.expected
    # the grammar of another request is another one, and a matcher that has refused an answer takes the next
    assert grammar.refused(answer.row, answer.answer_ids(oracle)) is None


def test_an_answer_that_may_not_end_is_refused_at_its_end() -> None:
    oracle = derived_oracle("derived-v13")
    answer = ANSWERS["json-schema"]
    ids = answer.answer_ids(oracle)[:-4]
    refused = AnswerGrammar(oracle).refused(answer.row, ids)
    assert refused is not None
    assert (refused.is_end, refused.index) == (True, len(ids))


def test_a_request_that_mistral_common_makes_no_grammar_for_is_an_error() -> None:
    oracle = derived_oracle("derived-v13")
    answer = ANSWERS["plain"]
    with pytest.raises(LibraryError, match="No tools provided"):
        AnswerGrammar(oracle).refused(answer.row, answer.answer_ids(oracle), {"tool_choice": "required"})


def test_without_llguidance_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    oracle = derived_oracle("derived-v13")
    monkeypatch.setattr("pytest_mistral_lora.chat.oracle.answer_grammar.is_installed", lambda module: False)
    assert "pytest-mistral-lora[guidance]" in AnswerGrammar.unavailable(oracle)
