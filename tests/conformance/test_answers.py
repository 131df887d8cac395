"""The answers of rows: read back, under a grammar, and what could not be judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import derived_tokenizer
from each_oracle import ALL, of_each, oracle_named
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import sampled

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.conformance.dataset.answers import DecodingJudge
from pytest_mistral_lora.conformance.dataset.checks import file_results
from pytest_mistral_lora.conformance.dataset.row_findings import call_findings
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.records.goldens import packaged_cases
from pytest_mistral_lora.records.known_answers import known_answers
from pytest_mistral_lora.strategies import rows, tool_rows

ANSWERS = {answer.name: answer for answer in known_answers()}
PLAIN, CALL = ANSWERS["plain"].row.to_json(), ANSWERS["call"].row.to_json()
LOSSY = {"trailing-spaces", "sentencepiece-space"}
"""The packaged rows with characters that are not encoded."""
SPOKEN_OTHERWISE = {"thinking-only", "thinking-after-text", "thinking-twice", "thinking-empty"}
"""The known answers whose thoughts servers read in another way."""


def judged(tmp_path: Path, tokenizer: Path, *rows: dict[str, Any]) -> dict[str, Result]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file_results(path, CheckpointTokenizer(tokenizer))


OFTEN = ("spm-v1", "spm-v3", "spm-v7", "derived-v11", "derived-v13-thinking", "derived-v15-schema")


@pytest.mark.parametrize("name", sampled(ALL, OFTEN))
def test_packaged_rows_and_known_answers_are_sound(name: str) -> None:
    oracle = oracle_named(name)
    judge = DecodingJudge(oracle)
    for case in packaged_cases():
        if case.fits(oracle):
            verdict = judge.judge(case.row, oracle.encode(case.row))
            assert not verdict.lost or case.name in LOSSY
            # its thought is not closed, and has a text behind it
            expected = {"ML650"} if case.name == "thinking-open" else set()
            assert {finding.rule for finding in verdict.findings} == expected, case.name
    for answer in ANSWERS.values():
        # its settings are not those of a row
        if answer.fits(oracle) and answer.name != "thinking-json-schema":
            findings = judge.judge(answer.row, oracle.encode(answer.row)).findings
            expected = {"ML650"} if answer.name in SPOKEN_OTHERWISE else set()
            assert {finding.rule for finding in findings} == expected, answer.name


def test_without_a_grammar_a_file_with_tools_is_not_checked(tmp_path: Path) -> None:
    results = judged(tmp_path, shipped_tokenizer("spm-v3"), PLAIN, CALL)
    reason = results["decoding-allows-answers"].not_checked
    assert [value for value in ("no grammar", "SentencePiece", "v3", "v11") if value not in reason] == []
    assert results["answers-are-read-back"] == Result()


def test_rows_that_ask_for_no_grammar_need_none(tmp_path: Path) -> None:
    assert judged(tmp_path, shipped_tokenizer("spm-v3"), PLAIN)["decoding-allows-answers"] == Result()


def test_a_missing_library_is_named_and_all_else_is_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_mistral_lora.chat.oracle.answer_grammar.is_installed", lambda module: False)
    thoughts = ANSWERS["thinking-twice"].row.to_json() | {"tools": CALL["tools"]}
    results = judged(tmp_path, derived_tokenizer("derived-v13-thinking"), CALL, thoughts)
    assert "pytest-mistral-lora[guidance]" in results["decoding-allows-answers"].not_checked
    assert [finding.rule for finding in results["answers-are-read-back"].findings] == ["ML650"]


def test_the_rows_that_a_grammar_judged_are_counted(tmp_path: Path) -> None:
    results = judged(tmp_path, derived_tokenizer("derived-v13"), PLAIN, CALL, CALL | {"tools": [*CALL["tools"]] * 1})
    assert dict(results["decoding-allows-answers"].facts) == {
        "rows_by_grammar": 2,
        "rows_not_by_grammar": 0,
        "rows_with_refused_call_ids": 0,
    }


def test_a_schema_that_no_grammar_can_be_made_of_is_counted(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"n": {"not": {"type": "string"}}}}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    hard = {**PLAIN, "response_format": form}
    result = judged(tmp_path, derived_tokenizer("derived-v13"), hard)["decoding-allows-answers"]
    assert result.not_checked.startswith("llguidance cannot use the grammar")
    both = judged(tmp_path, derived_tokenizer("derived-v13"), hard, CALL)["decoding-allows-answers"]
    assert (both.not_checked, dict(both.facts)["rows_not_by_grammar"]) == ("", 1)


def test_calls_of_v11_are_counted_and_the_rest_of_them_is_judged(tmp_path: Path) -> None:
    strict = json.loads(json.dumps(ANSWERS["call-other-order"].row.to_json()))
    strict["tools"][0]["function"]["strict"] = True
    rows = (CALL, strict, ANSWERS["text-call"].row.to_json())
    for tokenizer, count in (("derived-v11", 3), ("derived-v13", 0)):
        result = judged(tmp_path, derived_tokenizer(tokenizer), *rows)["decoding-allows-answers"]
        [finding] = result.findings
        assert (finding.rule, str(finding.place).rpartition(":")[2]) == ("ML651", "2, messages[1]")
        assert dict(result.facts)["rows_with_refused_call_ids"] == count


def test_an_answer_of_weight_0_is_not_judged(tmp_path: Path) -> None:
    row = json.loads(json.dumps(ANSWERS["thinking-twice"].row.to_json()))
    row["messages"][-1]["weight"] = 0
    row["messages"] += PLAIN["messages"]
    assert judged(tmp_path, derived_tokenizer("derived-v13-thinking"), row)["answers-are-read-back"] == Result()


def test_characters_that_are_not_encoded_are_noted_once(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "So. "}]} for n in "abcde"
    ]
    [finding] = judged(tmp_path, shipped_tokenizer("spm-v3"), PLAIN, *rows)["answers-are-read-back"].findings
    assert (finding.rule, str(finding.place).rpartition(":")[2]) == ("ML648", "2")
    assert "in 5 rows" in finding.found
    assert [line.rpartition(", ")[2] for line in finding.detail.splitlines()] == [
        "messages[1]: 1 space at the end left out"
    ] * 3


@settings(max_examples=10)
@given(data=st.one_of(rows(), tool_rows()))
@of_each("spm-v3", "derived-v11", "derived-v15")
def test_no_answer_of_a_row_is_decoded_as_another_message(oracle: Oracle, data: dict[str, Any]) -> None:
    row = Row.from_dict(data)
    try:
        encoded = oracle.encode(row)
    except OracleRejection:
        return
    broken = {finding.rule for finding in call_findings(row)}
    verdict = DecodingJudge(oracle).judge(row, encoded, broken)
    assert [finding for finding in verdict.findings if finding.rule != "ML651"] == []
