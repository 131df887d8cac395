"""What a rule takes as proof, and how signs, which are none, are shown: last, one row each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from dataset_recipes import said, write_rows

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.dataset.file_faults import file_faults
from pytest_mistral_lora.conformance.finding import PROOFS, RULES, Finding, _read_proof
from pytest_mistral_lora.report.lines import LOOK_AT

ANSWER = "It is a thing of this house, and it stands beside the old oven since last year."
BROKEN = [said(f"What is thing {number}?", ANSWER if number else "VoilÃ\xa0 la chose.") for number in range(20)]
LINES = [
    ("  ML636 rows.jsonl:1, messages[1].content: 'Ã\\xa0' for 'à': ", " 1 of 20 rows (5.0%)"),
    ("  ML644 rows.jsonl:2: ", " 19 of 20 rows (95.0%)"),
]
"""The beginning and the end of the line of each sign."""


def test_each_rule_names_its_fault_in_a_short_title_of_its_own() -> None:
    for rule in RULES.values():
        assert 0 < len(rule.fault) <= 60
        # without a value: neither a quotation nor a number
        assert re.fullmatch(r"[A-Za-z0_.',/ -]*", rule.fault)
        assert rule.fault not in (rule.title, rule.example.fault)
        subjects = [other.fault for other in RULES.of(rule.subject)]
        assert subjects.count(rule.fault) == 1


def test_a_finding_is_one_line_as_editors_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [said("a", "b"), said("a"), *[said("q", "") for _ in range(2)]]
    write_rows(Path("rows.jsonl"), rows)
    Path("table.json").write_text(json.dumps(rows, indent=1))
    for name in ("rows.jsonl", "table.json"):
        assert main(["check", name, "--tokenizer", "spm-v3", "--no-cache", "--output-format", "concise"]) == 1
        *lines, last = capsys.readouterr().out.splitlines()
        places = [re.fullmatch(r"(.+): (ML601) row cannot be used: (messages.*): .+", line) for line in lines]
        separator = ":" if name == "rows.jsonl" else ": row "
        assert [place and place[1] for place in places] == [f"{name}{separator}{number}" for number in (2, 3, 4)]
        assert last.startswith("3 findings of ")


def test_the_first_causes_are_whole_and_each_other_one_is_a_line(tmp_path: Path, capsys: Any) -> None:
    keys = {f"fault{letter}": 1 for letter in "abcdefgh"}
    path = write_rows(tmp_path / "rows.jsonl", [said("a", "b"), *[said("q", "x", **{key: 1}) for key in keys]])
    words = ["check", str(path), "--tokenizer", "spm-v3", "--no-cache"]
    for option, whole in (([], 5), (["-v"], 8)):
        assert main([*words, *option]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("  fix:") for line in lines) == whole
        assert sum(line.startswith("ML601 ") for line in lines) == 8
        assert any("(-v shows them whole)" in line for line in lines) == (not option)


def test_no_sign_is_an_error() -> None:
    for rule in RULES.values():
        assert {*rule.proof} <= PROOFS.keys()
        assert rule.severity == "note" or "sign" not in rule.proof
    # a rule that is a note has errors by another proof
    for name in ("ML628", "ML636", "ML643"):
        assert RULES[name].proof[0] == "sign"
        assert Finding(name, "a").is_sign
        assert Finding(name, "a", severity="error").proof in ("declaration", "contradiction")
    for fault in file_faults():
        assert fault.error is None or RULES[fault.rule].proof[-1] != "sign"


@pytest.mark.parametrize(
    ("proof", "severity"),
    [
        ("sign", "error"),
        (["oracle", "sign"], "note"),
        (["sign", "contradiction"], "error"),
        (["contradiction", "oracle"], "error"),
        ("guess", "note"),
        ([], "note"),
        (None, "error"),
    ],
)
def test_a_proof_that_proves_nothing_is_refused(proof: Any, severity: str) -> None:
    with pytest.raises(ValueError, match=r"^x\.toml, ML999\.proof: "):
        _read_proof(proof, severity, "x.toml, ML999.proof")


def test_a_rule_says_what_it_takes_as_proof(capsys: Any) -> None:
    assert main(["rules", "ML628"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"  proof:    sign. {PROOFS['sign']}" in lines
    assert f"  of error: contradiction. {PROOFS['contradiction']}" in lines
    assert main(["rules", "ML628", "--json"]) == 0
    [rule] = json.loads(capsys.readouterr().out)
    assert rule["proof"] == ["sign", "contradiction"]


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_rows(Path("rows.jsonl"), BROKEN)


def test_check_lists_signs_last_with_one_row_each(rows: Path, capsys: Any) -> None:
    assert main(["check", str(rows), "--tokenizer", "spm-v3", "--report", "out.json", "--report", "out.html"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index(LOOK_AT)
    for line, (start, end) in zip(lines[at + 1 : at + 3], LINES, strict=True):
        assert line.startswith(start)
        assert f"{end} - fix: " in line
    assert lines[at + 3].startswith("2 findings of 2 causes; ")
    report = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [cause["proof"] for cause in report["causes"]] == ["sign", "sign"]
    page = Path("out.html").read_text(encoding="utf-8")
    assert page.count('<li><a href="#cause-') == 2
    assert '<a href="#cause-1">ML636</a> rows.jsonl:1: ' in page


def test_audit_lists_signs_last(tmp_path: Path, capsys: Any) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    texts = ("<|im_start|>user\nWhat is 1?", "What is 2?")
    encoded = [oracle.encode(said(text, "A number.")) for text in texts]
    lines = [{"input_ids": [*row.input_ids], "labels": [*(row.labels or ())]} for row in encoded]
    path = write_rows(tmp_path / "encoded.jsonl", lines)
    assert main(["check", str(path), "--tokenizer", "spm-v3"]) == 0
    *_, title, line, verdict = capsys.readouterr().out.splitlines()
    assert title == LOOK_AT
    assert line.startswith(f"  ML629 {path}:1, messages[0].content: ")
    assert "<|im_start|>" in line
    assert verdict == "1 finding of 1 cause"


def test_check_fails_what_was_not_checked_if_asked(rows: Path, capsys: Any) -> None:
    words = ("check", str(rows), "--tokenizer", "spm-v3")
    assert main([*words, "--fail-on=not-checked"]) == 0
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    # v3 has no grammar to judge the answers by
    write_rows(rows, [{**row, "tools": tools} for row in BROKEN])
    assert main([*words]) == 0
    assert main([*words, "--fail-on=not-checked"]) == 1
    assert "1 failed, 0 not checked" in capsys.readouterr().out
