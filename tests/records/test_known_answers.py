"""The known answers: each version has them, and each is encoded and read back."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from each_oracle import ALL, oracle_named

from pytest_mistral_lora.chat.completions import read_calls
from pytest_mistral_lora.records.known_answers import KnownAnswer, known_answers

ANSWERS = known_answers()


def test_names_and_questions_are_unique() -> None:
    assert max(Counter(answer.name for answer in ANSWERS).values()) == 1
    questions = Counter(json.dumps(answer.row.messages[:-1]) for answer in ANSWERS)
    assert max(questions.values()) == 1


@pytest.mark.parametrize("name", ALL)
def test_each_tokenizer_encodes_the_answers_that_fit(name: str) -> None:
    oracle = oracle_named(name)
    fitting = [answer for answer in ANSWERS if answer.fits(oracle)]
    assert len(fitting) >= (15 if oracle.facts.tools_in is None else 45)
    for answer in fitting:
        ids = answer.answer_ids(oracle)
        assert oracle.encode(answer.row).input_ids == answer.prompt_ids(oracle) + ids, answer.name
        assert ids[-1] == oracle.eos_id
        message = answer.message(oracle)
        if message.calls:
            read = read_calls(ids, oracle)
            assert [repr(call) for call in read] == [repr(call) for call in message.calls], answer.name
        else:
            assert oracle.decode(ids) == message.thinking + message.text or len(message.chunks) > 1, answer.name


@pytest.mark.parametrize("name", ALL)
def test_no_answer_is_encoded_like_another(name: str) -> None:
    oracle = oracle_named(name)
    prompts = Counter(answer.prompt_ids(oracle) for answer in ANSWERS if answer.fits(oracle))
    assert max(prompts.values()) == 1


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.name)
def test_every_answer_is_fit_for_a_request(answer: KnownAnswer) -> None:
    choice = answer.settings.get("tool_choice")
    assert answer.settings.keys() <= {"tool_choice", "parallel_tool_calls"}
    assert answer.row.tools or choice is None
    assert not (answer.row.assistant_groups()[-1][1:])
