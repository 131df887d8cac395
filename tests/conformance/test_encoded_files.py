from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.reading import MAX_LINE_BYTES
from pytest_mistral_lora.conformance.checks import Settings
from pytest_mistral_lora.conformance.encoded.audit import CASES, KEPT, MOST_ERRORS, Audit, AuditReport, checks
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.conformance.targets import EncodedTarget, Target
from pytest_mistral_lora.errors import InputError, RowsError

Data = dict[str, Any]
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def target() -> Target:
    return Target("spm-v3")


@pytest.fixture(scope="module")
def oracle(target: Target) -> Oracle:
    return target.oracle


def _row(number: int) -> Data:
    return {
        "messages": [
            {"role": "user", "content": f"Number {number}?"},
            {"role": "assistant", "content": f"It is {number}."},
        ]
    }


@pytest.fixture
def lines(oracle: Oracle) -> list[Data]:
    return [_line(oracle, number) for number in range(5)]


def _line(oracle: Oracle, number: int) -> Data:
    encoded = oracle.encode(_row(number))
    labels = list(encoded.labels or ())
    return {"row": number, **_row(number), "input_ids": list(encoded.input_ids), "labels": labels}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(lines: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return path

    return write


@pytest.fixture
def dataset(write: Write) -> Path:
    return write([_row(number) for number in range(5)], "dataset.jsonl")


def _findings(path: Path, oracle: Oracle, *dataset: Path) -> list[Finding]:
    return [finding for verdict in Audit(path, oracle, dataset).verdicts() for finding in verdict.findings]


def _rules(path: Path, oracle: Oracle, *dataset: Path) -> list[str]:
    return [finding.rule for finding in _findings(path, oracle, *dataset)]


def test_a_sound_file_has_no_findings_with_its_dataset_or_without(
    lines: list[Data], write: Write, oracle: Oracle, dataset: Path
) -> None:
    audit = Audit(write(lines), oracle, (dataset,))
    verdicts = list(audit.verdicts())
    assert [verdict.state for verdict in verdicts] == ["sound"] * 6
    assert [verdict.index for verdict in verdicts] == [0, 1, 2, 3, 4, None]
    assert audit.tokens == sum(len(line["input_ids"]) for line in lines)
    assert audit.supervised == sum(label != -100 for line in lines for label in line["labels"])
    assert _rules(write(lines), oracle) == []


def test_numbers_are_optional_and_extra_keys_are_ignored(
    lines: list[Data], write: Write, oracle: Oracle, dataset: Path
) -> None:
    for line in lines:
        del line["row"]
        line["source"] = {"file": "mine"}
    assert _rules(write(lines), oracle) == []
    assert _rules(write(lines), oracle, dataset) == []
    del lines[1]
    assert _rules(write(lines), oracle, dataset) == ["ML502", "ML506"]
    lines.reverse()
    assert set(_rules(write(lines), oracle, dataset)) == {"ML502", "ML504", "ML506"}


@pytest.mark.parametrize("where", [0, 2])
def test_a_gap_in_the_numbers_is_said_without_a_dataset(
    where: int, lines: list[Data], write: Write, oracle: Oracle
) -> None:
    del lines[where]
    [finding] = _findings(write(lines), oracle)
    assert (finding.rule, finding.found) == ("ML502", f"1 of 5 rows are not there: {where}")


def test_rows_missing_at_the_end_are_said_with_a_dataset_and_so_are_their_texts(
    lines: list[Data], write: Write, oracle: Oracle, dataset: Path
) -> None:
    missing, texts = _findings(write(lines[:3]), oracle, dataset)
    assert (missing.rule, missing.found) == ("ML502", "2 of 5 rows are not there: 3, 4")
    assert (texts.rule, texts.found) == ("ML506", "2 assistant texts are not trained on")
    assert texts.detail.splitlines() == [f"{dataset}:4: 'It is 3.'", f"{dataset}:5: 'It is 4.'"]


def test_a_dataset_of_several_files_counts_through(lines: list[Data], write: Write, oracle: Oracle) -> None:
    parts = [write([_row(n) for n in numbers], f"{numbers[0]}.jsonl") for numbers in ((0, 1), (2, 3, 4))]
    assert _rules(write(lines), oracle, *parts) == []
    assert set(_rules(write(lines), oracle, *parts[::-1])) == {"ML505"}


def test_rows_of_a_dataset_that_say_the_same_may_come_as_often(write: Write, oracle: Oracle) -> None:
    twice = write([_row(1), _row(1)], "dataset.jsonl")
    lines = [{**_line(oracle, 1), "row": row} for row in range(2)]
    assert _rules(write(lines), oracle, twice) == []
    assert _rules(write(lines[:1]), oracle, twice) == ["ML502", "ML506"]


def test_a_weight_of_one_and_null_fields_are_no_change(lines: list[Data], write: Write, oracle: Oracle) -> None:
    spelled = _row(0)
    spelled["messages"][1]["weight"] = 1
    spelled["tools"] = None
    assert _rules(write(lines[:1]), oracle, write([spelled], "dataset.jsonl")) == []


def test_an_error_in_place_of_a_row_is_a_dropped_row(lines: list[Data], write: Write, oracle: Oracle) -> None:
    lines[1] = {"row": 1, "error": "ValueError: too long", **_row(1)}
    dropped, texts = _findings(write(lines), oracle)
    assert (dropped.rule, dropped.found) == ("ML502", "row 1 was dropped: ValueError: too long")
    assert texts.detail.endswith("'It is 1.'")
    lines[1] = {"row": 1, "error": ""}
    assert _rules(write(lines), oracle) == ["ML502"]


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

    audit = Audit(write([pack(0, 3, 0), pack(1, 4, 1, 2)]), oracle, (dataset,))
    assert [finding for verdict in audit.verdicts() for finding in verdict.findings] == []
    assert audit.packed == 2
    lost = _findings(write([pack(0, 3, 0), pack(1, 4, 1)]), oracle, dataset)
    assert [finding.rule for finding in lost] == ["ML502", "ML506"]
    assert lost[1].detail == f"{dataset}:3: 'It is 2.'"
    doubled = _findings(write([pack(0, 3, 0), pack(1, 4, 1, 2, 3)]), oracle, dataset)
    assert [finding.rule for finding in doubled] == ["ML505"]


def test_conversations_of_a_packed_sequence_may_have_tools_of_their_own(write: Write, oracle: Oracle) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    rows = [{**_row(0), "tools": [tool]}, _row(1)]
    parts = [oracle.encode(row) for row in rows]
    line = {
        "conversations": [rows[0], rows[1]["messages"]],
        "input_ids": [token for part in parts for token in part.input_ids],
        "labels": [label for part in parts for label in part.labels or ()],
        "position_ids": [n for part in parts for n in range(len(part.input_ids))],
    }
    assert _rules(write([line]), oracle) == []


BAD_LINES: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not valid JSON"),
    "a list": ("[1]", "a row is a list"),
    "a number": ("7", "a row is a number"),
    "duplicate keys": ('{"row": 0, "row": 0}', "appears twice"),
    "not a number": ('{"labels": NaN}', "NaN"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "no messages": ({"input_ids": [1], "labels": [1]}, 'no "messages"'),
    "no ids": ({"labels": []}, "input_ids: is missing"),
    "null labels": ({"labels": None}, "labels: is missing"),
    "text": ({"input_ids": "1 2"}, "input_ids: is a string"),
    "a float": ({"input_ids": [1, 2.5]}, "input_ids[1]: 2.5"),
    "a string among ids": ({"labels": [1, "2"]}, "labels[1]: '2'"),
    "a boolean": ({"labels": [True]}, "labels[0]: True"),
    "a negative row": ({"row": -1}, "row: -1"),
    "a row by name": ({"row": "first"}, "row: 'first'"),
    "positions too short": ({"position_ids": [0]}, "position_ids: 1 values for"),
    "a mask of strings": ({"attention_mask": ["1"]}, "attention_mask[0]: '1'"),
    "messages and conversations": ({"conversations": [[]]}, "has messages and conversations"),
    "no conversations": ({"conversations": [], "messages": None}, "has messages and conversations"),
    "a role of another vendor": ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_that_cannot_be_read_is_named_and_the_others_are_judged(
    name: str, lines: list[Data], write: Write, oracle: Oracle
) -> None:
    bad, words = BAD_LINES[name]
    whole = {**lines[1], **bad} if isinstance(bad, dict) else bad
    if name in ("no messages", "no ids"):
        whole = bad
    if name == "no ids":
        whole = {**_row(1), **bad}
    lines[2]["labels"] = list(lines[2]["input_ids"])
    path = write([lines[0], whole, *lines[2:]])
    audit = Audit(path, oracle)
    findings = [finding for verdict in audit.verdicts() for finding in verdict.findings]
    [unreadable] = [finding for finding in findings if finding.rule == "ML501"]
    assert unreadable.place.startswith(f"{path}:2")
    assert words in unreadable.text()
    assert "ML543" in {finding.rule for finding in findings}
    with pytest.raises(RowsError, match="1 bad row"):
        audit.raise_unreadable()


@pytest.mark.parametrize("value", [-1, -100, 32768, 2**70, 10**400])
def test_an_id_that_no_vocabulary_has_is_a_finding(value: int, lines: list[Data], write: Write, oracle: Oracle) -> None:
    lines[0]["input_ids"][3] = value
    rules = _rules(write(lines), oracle)
    assert rules[0] == "ML520"
    lines[0]["labels"][-1] = value if value != -100 else 7
    assert {"ML520", "ML542"} <= set(_rules(write(lines), oracle))


@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_an_empty_encoding_is_a_finding(key: str, lines: list[Data], write: Write, oracle: Oracle) -> None:
    lines[0][key] = []
    assert "ML540" in _rules(write(lines), oracle)
    lines[0]["input_ids"] = lines[0]["labels"] = []
    assert set(_rules(write(lines), oracle)) == {"ML531", "ML544", "ML506"}


def test_no_answer_is_called_lost_if_no_line_can_be_read(write: Write, oracle: Oracle, dataset: Path) -> None:
    assert _rules(write([{"input_ids": [1, 2], "labels": [1, 2]}] * 5), oracle, dataset) == ["ML501"] * 5


def test_a_huge_row_number_takes_no_time(lines: list[Data], write: Write, oracle: Oracle) -> None:
    lines[-1]["row"] = 10**18
    [finding] = _findings(write(lines), oracle)
    assert finding.rule == "ML502"
    assert finding.found.startswith("999999999999999996 of ")


def test_what_is_no_file_is_an_error(tmp_path: Path, oracle: Oracle) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(InputError, match=str(path)):
            list(Audit(path, oracle).verdicts())


def test_a_dataset_that_cannot_be_read_is_an_error(lines: list[Data], write: Write, oracle: Oracle) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        list(Audit(write(lines), oracle, (Path("none.jsonl"),)).verdicts())
    with pytest.raises(RowsError, match=r"bad\.jsonl:1"):
        list(Audit(write(lines), oracle, (write(["{"], "bad.jsonl"),)).verdicts())


def test_an_empty_file_is_unreadable(write: Write, oracle: Oracle) -> None:
    assert _rules(write([]), oracle) == ["ML501"]
    assert _rules(write(["", "  "]), oracle) == ["ML501"]


def test_a_huge_line_is_refused_unread(lines: list[Data], write: Write, oracle: Oracle) -> None:
    path = write(lines[:1])
    with path.open("a") as file:
        file.writelines("7," * 2**20 for _ in range(MAX_LINE_BYTES // 2**21 + 1))
        file.write("\n" + json.dumps(lines[1]) + "\n")
    tracemalloc.start()
    findings = _findings(path, oracle)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [finding.rule for finding in findings] == ["ML501"]
    assert peak < 3 * MAX_LINE_BYTES


def test_a_file_that_is_wrong_all_over_is_judged_in_bounded_memory(write: Write, oracle: Oracle) -> None:
    line = _line(oracle, 7)
    line["labels"] = list(line["input_ids"])
    more = MOST_ERRORS + 10
    path = write([*({**line, "row": row} for row in range(50)), *["{"] * more])
    report = AuditReport.read(path, oracle)
    assert report.audit.counts == {"ML543": 50, "ML501": more}
    assert len(report.audit.errors) == MOST_ERRORS
    assert [len(kept) for kept in report.kept.values()] == [KEPT, KEPT]
    assert [finding.found for finding in report.findings_of("ML543")][KEPT:] == ["… and 30 more"]
    with pytest.raises(RowsError, match=r"10 more lines cannot be read|and 981 more"):
        report.audit.raise_unreadable()


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
    }
    assert dict(results["ids"].facts) == {"rows": 4, "judged": 4, "wrong": 2, "packed": 0}


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
    [finding] = _findings(write([_line(v1, 0)]), v3)
    assert (finding.rule, finding.found) == ("ML532", "these are the ids of spm-v1 (tokenizer.model.v1)")
