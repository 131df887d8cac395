"""The packaged preference pairs: every version that a pair names encodes its answers, but for the pair to refuse."""

from __future__ import annotations

import pytest
from each_oracle import ALL, oracle_named
from mistral_common.protocol.instruct.validator import ValidationMode
from preference_records import ids_of

from pytest_mistral_lora.chat.kinds.preference import answer_of
from pytest_mistral_lora.chat.kinds.records import parse_rows
from pytest_mistral_lora.errors import OracleRejection
from pytest_mistral_lora.records.goldens import packaged_pairs

CASES = {case.name: case for case in packaged_pairs()}


def test_every_pair_is_needed_and_there_is_one_to_refuse() -> None:
    assert len(CASES) == len(packaged_pairs())
    assert [name for name, case in CASES.items() if case.is_refused] == ["empty-answer"]
    for case in CASES.values():
        assert [row.side for row in case.rows] == ["chosen", "rejected"]
        assert parse_rows(case.rows[0].kind.record(case.rows), place=case.rows[0].place.row) == case.rows


@pytest.mark.parametrize("name", ALL)
def test_each_answer_has_the_ids_of_mistral_common_unless_it_is_refused(name: str) -> None:
    oracle = oracle_named(name)
    fitting = [case for case in CASES.values() if case.fits(oracle)]
    assert {case.name for case in CASES.values()} - {case.name for case in fitting} <= {
        "thinking", "tool-call", "tool-arguments", "tool-result-in-prompt", "tool-result-in-answer"
    }  # fmt: skip
    for case in fitting:
        if case.is_refused:
            with pytest.raises(OracleRejection):
                oracle.encode(case.rows[1])
            continue
        record = case.rows[0].kind.record(case.rows)
        prompt = ids_of(oracle, record["prompt"], record.get("tools"), ValidationMode.test)
        for row in case.rows:
            encoded = oracle.encode(row)
            assert list(encoded.input_ids[: len(prompt)]) == prompt, case.name
            labels = list(encoded.labels or ())
            assert set(labels[: len(prompt)]) == {-100}, case.name
            has_result = any(message["role"] == "tool" for message in answer_of(row).messages)
            assert (-100 in labels[len(prompt) :]) == has_result, case.name
