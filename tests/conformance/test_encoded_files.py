from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from derived_tekken import derived_tokenizer
from encoded_files import Data, audit_findings, audit_rules, number_line, number_row, write_lines

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.encoded.audit import CASES, OF_CHAT_ROWS, Audit, checks
from pytest_mistral_lora.conformance.targets import EncodedTarget, Target
from pytest_mistral_lora.formats.row_sources import FileRows
from pytest_mistral_lora.records.known_answers import known_answers

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def target() -> Target:
    return Target("spm-v3")


@pytest.fixture(scope="module")
def oracle(target: Target) -> Oracle:
    return target.oracle


@pytest.fixture
def lines(oracle: Oracle) -> list[Data]:
    return [number_line(oracle, number) for number in range(5)]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return partial(write_lines, tmp_path)


@pytest.fixture
def dataset(write: Write) -> Path:
    return write([number_row(number) for number in range(5)], "dataset.jsonl")


def test_a_sound_file_has_no_findings_with_its_dataset_or_without(
    lines: list[Data], write: Write, oracle: Oracle, dataset: Path
) -> None:
    audit = Audit(FileRows(write(lines)), oracle, (dataset,))
    verdicts = list(audit.verdicts())
    assert [verdict.state for verdict in verdicts] == ["sound"] * 6
    assert [verdict.index for verdict in verdicts] == [0, 1, 2, 3, 4, None]
    assert audit.totals.figures.tokens == sum(len(line["input_ids"]) for line in lines)
    assert audit.totals.figures.supervised == sum(label != -100 for line in lines for label in line["labels"])
    assert audit_rules(write(lines), oracle) == []


def test_numbers_are_optional_and_extra_keys_are_ignored(
    lines: list[Data], write: Write, oracle: Oracle, dataset: Path
) -> None:
    for line in lines:
        del line["row"]
        line["source"] = {"file": "mine"}
    assert audit_rules(write(lines), oracle) == []
    assert audit_rules(write(lines), oracle, dataset) == []
    del lines[1]
    assert audit_rules(write(lines), oracle, dataset) == ["ML502", "ML506"]
    lines.reverse()
    assert set(audit_rules(write(lines), oracle, dataset)) == {"ML502", "ML504", "ML506"}


@pytest.mark.parametrize("where", [0, 2])
def test_a_gap_in_the_numbers_is_said_without_a_dataset(
    where: int, lines: list[Data], write: Write, oracle: Oracle
) -> None:
    del lines[where]
    [finding] = audit_findings(write(lines), oracle)
    assert (finding.rule, finding.found) == ("ML502", f"1 of 5 rows are not there: {where}")


def test_rows_missing_at_the_end_are_said_with_a_dataset_and_so_are_their_texts(
    lines: list[Data], write: Write, oracle: Oracle, dataset: Path
) -> None:
    missing, texts = audit_findings(write(lines[:3]), oracle, dataset)
    assert (missing.rule, missing.found) == ("ML502", "2 of 5 rows are not there: 3, 4")
    assert (texts.rule, texts.found) == ("ML506", "2 assistant texts are not trained on")
    assert texts.detail.splitlines() == [f"{dataset}:4: 'It is 3.'", f"{dataset}:5: 'It is 4.'"]


def test_a_dataset_of_several_files_counts_through(lines: list[Data], write: Write, oracle: Oracle) -> None:
    parts = [write([number_row(n) for n in numbers], f"{numbers[0]}.jsonl") for numbers in ((0, 1), (2, 3, 4))]
    assert audit_rules(write(lines), oracle, *parts) == []
    assert set(audit_rules(write(lines), oracle, *parts[::-1])) == {"ML505"}


def test_rows_of_a_dataset_that_say_the_same_may_come_as_often(write: Write, oracle: Oracle) -> None:
    twice = write([number_row(1), number_row(1)], "dataset.jsonl")
    lines = [{**number_line(oracle, 1), "row": row} for row in range(2)]
    # that the row is there twice is a note, as for the dataset
    assert audit_rules(write(lines), oracle, twice) == ["ML608"]
    assert audit_rules(write(lines[:1]), oracle, twice) == ["ML502", "ML506"]


def test_a_weight_of_one_and_null_fields_are_no_change(lines: list[Data], write: Write, oracle: Oracle) -> None:
    spelled = number_row(0)
    spelled["messages"][1]["weight"] = 1
    spelled["tools"] = None
    assert audit_rules(write(lines[:1]), oracle, write([spelled], "dataset.jsonl")) == []


def test_an_error_in_place_of_a_row_is_a_dropped_row(lines: list[Data], write: Write, oracle: Oracle) -> None:
    lines[1] = {"row": 1, "error": "ValueError: too long", **number_row(1)}
    dropped, texts = audit_findings(write(lines), oracle)
    assert (dropped.rule, dropped.found) == ("ML502", "row 1 was dropped: ValueError: too long")
    assert texts.detail.endswith("'It is 1.'")
    lines[1] = {"row": 1, "error": ""}
    assert audit_rules(write(lines), oracle) == ["ML502"]


def test_packed_conversations_are_counted_over_the_whole_file(
    lines: list[Data], write: Write, oracle: Oracle, dataset: Path
) -> None:
    def pack(number: int, *rows: int) -> Data:
        parts = [lines[row] for row in rows]
        return {
            "row": number,
            "conversations": [part["messages"] for part in parts],
            "input_ids": [token for part in parts for token in part["input_ids"]],
            "labels": [label for part in parts for label in part["labels"]],
            "position_ids": [n for part in parts for n in range(len(part["input_ids"]))],
        }

    audit = Audit(FileRows(write([pack(0, 3, 0), pack(1, 4, 1, 2)])), oracle, (dataset,))
    assert [finding for verdict in audit.verdicts() for finding in verdict.findings] == []
    assert audit.totals.figures.packed == 2
    lost = audit_findings(write([pack(0, 3, 0), pack(1, 4, 1)]), oracle, dataset)
    assert [finding.rule for finding in lost] == ["ML502", "ML506"]
    assert lost[1].detail == f"{dataset}:3: 'It is 2.'"
    doubled = audit_findings(write([pack(0, 3, 0), pack(1, 4, 1, 2, 3)]), oracle, dataset)
    assert [finding.rule for finding in doubled] == ["ML505", "ML608"]


def test_conversations_of_a_packed_sequence_may_have_tools_of_their_own(write: Write, oracle: Oracle) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{**number_row(0), "tools": [tool]}, number_row(1)]
    parts = [oracle.encode(row) for row in rows]
    line = {
        "conversations": [rows[0], rows[1]["messages"]],
        "input_ids": [token for part in parts for token in part.input_ids],
        "labels": [label for part in parts for label in part.labels or ()],
        "position_ids": [n for part in parts for n in range(len(part.input_ids))],
    }
    assert audit_rules(write([line]), oracle) == []


def _settings() -> Settings:
    return Settings(1, None, "cpu", True, (), False, Path())


def _judge(path: Path, target: Target, *dataset: Path) -> Iterator[tuple[str, Any]]:
    for check in checks(EncodedTarget("rows", path, judge=target, dataset=dataset), _settings()):
        yield check.case, check.run()


def test_the_checks_of_a_file_share_one_pass_and_part_its_findings(
    lines: list[Data], write: Write, target: Target, dataset: Path
) -> None:
    lines[0]["labels"] = [-100] * len(lines[0]["labels"])
    lines[1]["input_ids"].insert(0, 1)
    lines[1]["labels"].insert(0, -100)
    del lines[3]
    results = dict(_judge(write(lines), target, dataset))
    assert list(results) == list(CASES)
    found = {case: [finding.rule for finding in result.findings] for case, result in results.items()}
    assert found == {
        "file": [],
        "rows-complete": ["ML502"],
        "ids": ["ML521"],
        "labels": ["ML544"],
        "packing": [],
        "supervised-text": ["ML506"],
        "answers": [],
        "decoding": [],
        **{case: [] for case in OF_CHAT_ROWS},
    }
    counts = {"rows": 4, "judged": 4, "wrong": 2, "packed": 0}
    assert dict(results["ids"].facts) == {**counts, "encoded rows of": "4 rows, 4 judged"}


@pytest.mark.parametrize(("tokenizer", "count"), [("derived-v11", 1), ("derived-v13", 0)])
def test_rows_with_calls_whose_ids_the_grammar_refuses_are_counted(tokenizer: str, count: int, write: Write) -> None:
    target = Target("base", derived_tokenizer(tokenizer))
    row = next(answer.row for answer in known_answers() if answer.name == "call")
    encoded = target.oracle.encode(row)
    line = row.to_json() | {"input_ids": list(encoded.input_ids), "labels": list(encoded.labels or ())}
    result = dict(_judge(write([line]), target))["decoding"]
    assert (result.findings, dict(result.facts)["rows_with_refused_call_ids"]) == ((), count)


def test_sequences_whose_positions_run_on_without_harm_are_counted(
    lines: list[Data], write: Write, target: Target
) -> None:
    line = {
        "conversations": [line["messages"] for line in lines],
        "input_ids": [token for line in lines for token in line["input_ids"]],
        "labels": [label for line in lines for label in line["labels"]],
        "attention_mask": [number for number, line in enumerate(lines, 1) for _ in line["input_ids"]],
    }
    result = dict(_judge(write([line]), target))["packing"]
    assert (result.findings, dict(result.facts)["positions_run_on"]) == ((), 1)


def test_lines_without_numbers_and_without_a_dataset_may_lack_rows(
    lines: list[Data], write: Write, target: Target, dataset: Path
) -> None:
    assert not dict(_judge(write(lines), target))["rows-complete"].not_checked
    for line in lines:
        del line["row"]
    assert "check --dataset" in dict(_judge(write(lines), target))["rows-complete"].not_checked
    assert not dict(_judge(write(lines), target, dataset))["rows-complete"].not_checked


@pytest.mark.parametrize("lines", [["{"], [], ["", "  "], ["{", "[]", "3"]])
def test_a_file_of_which_nothing_can_be_judged_is_not_checked(lines: list[str], write: Write, target: Target) -> None:
    results = dict(_judge(write(lines), target))
    assert {finding.rule for finding in results["file"].findings} == {"ML501"}
    assert {case for case, result in results.items() if result.not_checked} == set(CASES) - {"file"}


def test_rows_that_were_all_refused_by_the_trainer_are_dropped_and_nothing_else_is_judged(
    lines: list[Data], write: Write, target: Target
) -> None:
    refused = [{"row": n, "messages": line["messages"], "error": "no"} for n, line in enumerate(lines)]
    results = dict(_judge(write(refused), target))
    assert {finding.rule for finding in results["rows-complete"].findings} == {"ML502"}
    assert {"ids", "labels", "packing"} <= {case for case, result in results.items() if result.not_checked}


def test_a_row_that_mistral_common_refuses_is_not_judged(lines: list[Data], write: Write, target: Target) -> None:
    lines[1]["messages"] = lines[1]["messages"][::-1]
    results = dict(_judge(write(lines), target))
    [finding] = results["file"].findings
    assert finding.rule == "ML507"
    assert dict(results["file"].facts)["judged"] == 4


def test_the_shipped_file_is_found_by_its_name_where_it_made_the_ids(write: Write) -> None:
    v3, v1 = (Oracle(shipped_tokenizer(name)) for name in ("spm-v3", "spm-v1"))
    [finding] = audit_findings(write([number_line(v1, 0)]), v3)
    assert finding.rule == "ML532"
    assert "spm-v1 (tokenizer.model.v1)" in finding.found
