"""Each objective gives a loss to its tokens and to no other, in every version that can express it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from each_oracle import LAYOUTS, NEWER, of_each, oracle_named
from hypothesis import given, settings

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.objective import ANSWERS, MODIFIERS, TURNS, Objective
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.conformance.encoded.row_faults import label_faults
from pytest_mistral_lora.conformance.mask.row_laws import (
    bos_violation,
    eos_violation,
    owner_violation,
    partition_violation,
    whole_turn_violation,
)
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.strategies import rows, tool_rows

OBJECTIVES = [
    Objective(turns, without)
    for turns in TURNS
    for count in range(len(MODIFIERS) + 1)
    for without in itertools.combinations(MODIFIERS, count)
]
CALL = {"id": "123456789", "function": {"name": "f", "arguments": "{}"}}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "9", "tool_call_id": "123456789", "name": "f"},
    {"role": "assistant", "content": "four"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def fitting(oracle: Oracle) -> list[Objective]:
    """Return the objectives that say something for a tokenizer."""
    needed = {"no-thinking": "[THINK]", "no-calls": "[TOOL_CALLS]"}
    lacking = {word for word, literal in needed.items() if literal not in oracle.control_ids}
    return [objective for objective in OBJECTIVES if lacking.isdisjoint(objective.without)]


def encoded_by(words: str, oracle: Oracle, messages: list[dict[str, Any]], **more: Any) -> EncodedRow:
    row = parse_row({"messages": messages, **more})
    return oracle.encode(replace(row, objective=Objective.of(words, "test")))


def trained(encoded: EncodedRow, oracle: Oracle) -> str:
    """Return the tokens with a loss as text, an underscore for each run without one."""
    assert encoded.labels is not None
    runs = itertools.groupby(zip(encoded.input_ids, encoded.labels, strict=True), lambda one: one[1] == IGNORE_INDEX)
    return "".join("_" if masked else "".join(oracle.piece(token) for token, _ in run) for masked, run in runs)


def turn_weights(row: Row, oracle: Oracle) -> dict[int, bool]:
    """Return whether each turn of the model has the weight 1."""
    encoded = oracle.encode(replace(row, objective=ANSWERS))
    return {span.turn: span.supervised for span in encoded.spans if span.is_answer and span.turn is not None}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("answers", "_▁two</s>_CALL</s>_▁four</s>"),
        ("last-answer", "_▁four</s>"),
        ("last-round", "_CALL</s>_▁four</s>"),
        ("no-calls", "_▁two</s>_▁four</s>"),
        ("last-round,no-calls", "_▁four</s>"),
        ("no-calls, last-answer", "_▁four</s>"),
    ],
)
def test_an_objective_trains_its_turns(words: str, expected: str) -> None:
    oracle = oracle_named("spm-v7")
    made = encoded_by(words, oracle, TALK, tools=TOOLS)
    [call] = [span for span in made.spans if span.kind == "tool_call"]
    written = "".join(oracle.piece(token) for token in made.input_ids[call.start : call.end])
    assert trained(made, oracle) == expected.replace("CALL", written)


def test_everything_is_all_but_bos_and_answers_of_weight_zero() -> None:
    oracle = oracle_named("spm-v3")
    talk = [TALK[0], {**TALK[1], "weight": 0}, TALK[2], {"role": "assistant", "content": "four"}]
    made = encoded_by("everything", oracle, talk)
    assert trained(made, oracle) == "_[INST]▁one[/INST]_[INST]▁three[/INST]▁four</s>"


def test_a_conversation_that_ends_with_a_call_trains_that_call_alone() -> None:
    oracle = oracle_named("spm-v7")
    made = encoded_by("last-answer", oracle, TALK[:4], tools=TOOLS)
    assert trained(made, oracle).startswith("_[TOOL_CALLS]")
    assert not encoded_by("last-answer,no-calls", oracle, TALK[:4], tools=TOOLS).supervised_tokens


@pytest.mark.parametrize("closed", [True, False])
def test_a_thought_has_no_loss_and_its_answer_has_one(closed: bool) -> None:
    oracle = oracle_named("derived-v13-thinking")
    thought = {"type": "thinking", "thinking": "hm", **({} if closed else {"closed": False})}
    content = [thought, {"type": "text", "text": "four"}] if closed else [{"type": "text", "text": "four"}, thought]
    made = encoded_by("no-thinking", oracle, [TALK[0], {"role": "assistant", "content": content}])
    text = trained(made, oracle)
    assert "four" in text
    assert text.endswith("</s>")
    assert "hm" not in text
    assert "THINK" not in text


def test_joined_answers_are_one_last_answer() -> None:
    oracle = oracle_named("spm-v3")
    said = [{"role": "assistant", "content": "two"}, {"role": "assistant", "content": "four"}]
    assert "two" in trained(encoded_by("last-answer", oracle, [TALK[0], *said]), oracle)
    said = [{**said[0], "weight": 0}, said[1]]
    assert "two" not in trained(encoded_by("last-answer", oracle, [TALK[0], *said]), oracle)
    said = [{"role": "assistant", "content": "two"}, {"role": "assistant", "content": "four", "weight": 0}]
    assert not encoded_by("last-answer", oracle, [TALK[0], *said]).supervised_tokens


def laws_of(row: Row, encoded: EncodedRow, oracle: Oracle) -> list[str]:
    laws = (partition_violation, owner_violation, whole_turn_violation, eos_violation, bos_violation)
    return [found for law in laws if (found := law(row, encoded, oracle))]


def judge_each(oracle: Oracle, data: Mapping[str, Any]) -> None:
    """Let each objective keep the laws, and find the labels of each other one that differ."""
    plain = parse_row(data)
    made = {one: oracle.encode(replace(plain, objective=one)) for one in fitting(oracle)}
    weights = turn_weights(plain, oracle)
    for objective, encoded in made.items():
        row = replace(plain, objective=objective)
        assert encoded.input_ids == made[ANSWERS].input_ids
        assert laws_of(row, encoded, oracle) == [], objective
        turns = [turn for turn, weight in weights.items() if weight]
        found = {span.turn for span in encoded.spans if span.is_answer and span.supervised}
        if objective.turns in ("answers", "everything") and not objective.without:
            assert found == set(turns)
        if objective.turns == "last-answer":
            assert found <= {max(weights)} & set(turns)
        for other, labels in made.items():
            given = labels.labels or ()
            faults = label_faults(encoded, encoded.input_ids, given, oracle, objective)
            assert bool(faults) == (given != encoded.labels), (objective, other)


@settings(max_examples=6)
@given(row=rows(alternating=False, weights=True))
@of_each("spm-v1", "spm-v3", "spm-v7", "derived-v13")
def test_objectives_keep_the_laws_and_differ(oracle: Oracle, row: dict[str, Any]) -> None:
    judge_each(oracle, row)


@settings(max_examples=3)
@given(row=tool_rows(thinking=True))
@of_each("derived-v15-schema")
def test_objectives_of_thoughts_and_calls_keep_the_laws_and_differ(oracle: Oracle, row: dict[str, Any]) -> None:
    judge_each(oracle, row)


def test_the_first_label_is_free_if_everything_is_trained_on() -> None:
    oracle = oracle_named("spm-v3")
    everything = Objective.of("everything", "test")
    made = encoded_by("everything", oracle, TALK[:2])
    assert label_faults(made, made.input_ids, made.input_ids, oracle, everything) == []
    masked = (*made.input_ids[:3], IGNORE_INDEX, *made.input_ids[4:])
    [fault] = label_faults(made, made.input_ids, masked, oracle, everything)
    assert fault.rule == "ML550"
    answers = oracle.encode(parse_row({"messages": TALK[:2]}))
    [fault] = label_faults(answers, answers.input_ids, answers.input_ids, oracle)
    assert fault.rule == "ML543"


def test_a_wrong_id_is_no_fault_of_labels_if_everything_is_trained_on() -> None:
    oracle, everything = oracle_named("spm-v3"), Objective("everything")
    encoded = encoded_by("everything", oracle, TALK, tools=TOOLS)
    ids = list(encoded.input_ids)
    at = ids.index(oracle.eos_id) - 1
    ids[at] += 1
    assert label_faults(encoded, ids, ids, oracle, everything) == []
    masked = [IGNORE_INDEX] * at + ids[at:]
    assert {fault.rule for fault in label_faults(encoded, ids, masked, oracle, everything)} == {"ML551"}


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("last-anwser", "did you mean 'last-answer'"),
        ("answers,answers", "twice"),
        ("answers,last-round", "answers and last-round"),
        ("", "''"),
        (None, "None"),
    ],
)
def test_words_that_are_no_objective_are_refused_with_their_place(words: Any, found: str) -> None:
    with pytest.raises(InputError) as refused:
        Objective.of(words, "training.objective")
    assert str(refused.value).startswith("training.objective: ")
    assert found in str(refused.value)


@pytest.mark.parametrize("name", [*LAYOUTS, *NEWER])
def test_a_word_about_a_token_that_is_lacking_is_refused(name: str) -> None:
    oracle = oracle_named(name)
    for word, literal in (("no-thinking", "[THINK]"), ("no-calls", "[TOOL_CALLS]")):
        objective = Objective.of(word, "--objective")
        if literal in oracle.control_ids:
            objective.require(oracle.control_ids, oracle.version, "--objective")
        else:
            with pytest.raises(InputError, match=f"--objective: {word} is about"):
                objective.require(oracle.control_ids, oracle.version, "--objective")


def test_words_and_objectives_convert_into_each_other() -> None:
    for objective in OBJECTIVES:
        assert Objective.of(str(objective), "test") == objective
        assert objective.meaning
    assert Objective.of("no-calls", "test") == Objective("answers", ("no-calls",))
