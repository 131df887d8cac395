"""Lines of an encoded-rows file that cannot be read, or that nobody would write."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from encoded_files import Data, audit_findings, audit_rules, number_line, number_row, write_lines

from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.chat.reading.limits import MAX_ROW_BYTES
from pytest_mistral_lora.conformance.encoded.audit import KEPT, MOST_ERRORS, Audit, AuditReport
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError, RowsError
from pytest_mistral_lora.formats.row_sources import FileRows

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Target("spm-v3").oracle


@pytest.fixture
def lines(oracle: Oracle) -> list[Data]:
    return [number_line(oracle, number) for number in range(5)]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return partial(write_lines, tmp_path)


BAD_LINES: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "not valid JSON"),
    "a list": ("[1]", "a row is a list"),
    "a number": ("7", "a row is a number"),
    "duplicate keys": ('{"row": 0, "row": 0}', "appears twice"),
    "not a number": ('{"labels": NaN}', "NaN"),
    "deep": ("[" * 100_000, "nested too deeply"),
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
    if name == "no ids":
        whole = {**number_row(1), **bad}
    lines[2]["labels"] = list(lines[2]["input_ids"])
    path = write([lines[0], whole, *lines[2:]])
    audit = Audit(FileRows(path), oracle)
    findings = [finding for verdict in audit.verdicts() for finding in verdict.findings]
    [unreadable] = [finding for finding in findings if finding.rule == "ML501"]
    assert str(unreadable.place).startswith(f"{path}:2")
    assert words in unreadable.text()
    assert "ML543" in {finding.rule for finding in findings}
    with pytest.raises(RowsError, match="1 bad row"):
        audit.raise_unreadable()


@pytest.mark.parametrize("value", [-1, -100, 32768, 2**70, 10**400])
def test_an_id_that_no_vocabulary_has_is_a_finding(value: int, lines: list[Data], write: Write, oracle: Oracle) -> None:
    lines[0]["input_ids"][3] = value
    rules = audit_rules(write(lines), oracle)
    assert rules[0] == "ML520"
    lines[0]["labels"][-1] = value if value != -100 else 7
    assert {"ML520", "ML542"} <= set(audit_rules(write(lines), oracle))


@pytest.mark.parametrize("value", [-1, 32768, 2**70])
def test_an_answer_of_an_id_that_no_vocabulary_has_is_no_text(
    value: int, lines: list[Data], write: Write, oracle: Oracle
) -> None:
    again = json.loads(json.dumps(lines[4]))
    at = next(n for n, label in enumerate(again["labels"]) if label != -100)
    again["input_ids"][at] = again["labels"][at] = value
    # a row that comes again has its answers on one side alone, and a fault in place of one of them
    assert audit_rules(write([*lines, again]), oracle) == ["ML503", "ML520"]


def test_a_row_that_comes_again_hides_no_row_that_is_there_twice(
    lines: list[Data], write: Write, oracle: Oracle
) -> None:
    named = [line | {"row": number} for number, line in enumerate(lines)]
    twice = named[1] | {"row": len(lines)}
    path = write([*named, twice, named[0]])
    found = [(finding.rule, str(finding.place)) for finding in audit_findings(path, oracle)]
    repeated = f"{path}:{len(lines) + 1}"
    assert [place for rule, place in found if rule == "ML608"] == [repeated]
    assert "ML503" in {rule for rule, _ in found}


@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_an_empty_encoding_is_a_finding(key: str, lines: list[Data], write: Write, oracle: Oracle) -> None:
    lines[0][key] = []
    assert "ML540" in audit_rules(write(lines), oracle)
    lines[0]["input_ids"] = lines[0]["labels"] = []
    assert set(audit_rules(write(lines), oracle)) == {"ML531", "ML544", "ML506"}


def test_no_answer_is_called_lost_if_no_line_can_be_read(write: Write, oracle: Oracle) -> None:
    dataset = write([number_row(number) for number in range(5)], "dataset.jsonl")
    assert audit_rules(write([{"input_ids": [1, 2]}] * 5), oracle, dataset) == ["ML501"] * 5


def test_a_huge_row_number_takes_no_time(lines: list[Data], write: Write, oracle: Oracle) -> None:
    lines[-1]["row"] = 10**18
    [finding] = audit_findings(write(lines), oracle)
    assert finding.rule == "ML502"
    assert finding.found.startswith("999999999999999996 of ")


def test_what_is_no_file_is_an_error(tmp_path: Path, oracle: Oracle) -> None:
    for path in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(InputError, match=str(path)):
            list(Audit(FileRows(path), oracle).verdicts())


def test_a_dataset_that_cannot_be_read_is_an_error(lines: list[Data], write: Write, oracle: Oracle) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl"):
        list(Audit(FileRows(write(lines)), oracle, (Path("none.jsonl"),)).verdicts())
    with pytest.raises(RowsError, match=r"bad\.jsonl:1"):
        list(Audit(FileRows(write(lines)), oracle, (write(["{"], "bad.jsonl"),)).verdicts())


def test_an_empty_file_is_unreadable(write: Write, oracle: Oracle) -> None:
    assert audit_rules(write([]), oracle) == ["ML501"]
    assert audit_rules(write(["", "  "]), oracle) == ["ML501"]


def test_a_huge_line_is_refused_unread(lines: list[Data], write: Write, oracle: Oracle) -> None:
    path = write(lines[:1])
    with path.open("a") as file:
        file.writelines("7," * 2**20 for _ in range(MAX_ROW_BYTES // 2**21 + 1))
        file.write("\n" + json.dumps(lines[1]) + "\n")
    tracemalloc.start()
    findings = audit_findings(path, oracle)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [finding.rule for finding in findings] == ["ML501"]
    assert peak < 3 * MAX_ROW_BYTES


def test_a_file_that_is_wrong_all_over_is_judged_in_bounded_memory(write: Write, oracle: Oracle) -> None:
    line = number_line(oracle, 7)
    line["labels"] = list(line["input_ids"])
    more = MOST_ERRORS + 10
    path = write([*({**line, "row": row} for row in range(50)), *["{"] * more])
    report = AuditReport.read(FileRows(path), oracle)
    assert report.audit.counts == {"ML543": 50, "ML501": more, "ML608": 1}
    assert len(report.audit.errors) == MOST_ERRORS
    assert {rule: len(kept) for rule, kept in report.kept.items()} == {"ML543": KEPT, "ML501": KEPT, "ML608": 1}
    assert [finding.found for finding in report.findings_of("ML543")][KEPT:] == ["… and 30 more"]
    with pytest.raises(RowsError, match=r"10 more lines cannot be read|and 981 more"):
        report.audit.raise_unreadable()
