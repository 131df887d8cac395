"""The outcomes of pytest, of its workers and of the verbs are the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main

Run = Callable[..., pytest.RunResult]
FILE = shipped_tokenizer("spm-v3")
WORDS = ("--mistral-encoded=rows.jsonl", f"--mistral-tokenizer={FILE}", "-k", "::encoded::")


def _write_rows(path: Path) -> None:
    """Write encoded rows with a line that cannot be read, and one whose EOS is masked."""
    oracle, lines = Oracle(FILE), []
    for n in range(3):
        row = {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": f"It is {n}."}]}
        encoded = oracle.encode(row)
        lines.append({"row": n, **row, "input_ids": [*encoded.input_ids], "labels": [*(encoded.labels or ())]})
    lines[0]["labels"][-1] = -100
    path.write_text("".join(f"{text}\n" for text in (json.dumps(lines[0]), "{", json.dumps(lines[2]))))


def _content(report: Path) -> tuple[Any, ...]:
    """Return what a report says, apart from times and commands; causes come in the order of the workers."""
    data = json.loads(report.read_text())
    checks = [{**check, "seconds": 0, "commands": {}} for check in data["checks"]]
    causes = sorted(({**cause, "commands": {}} for cause in data["causes"]), key=lambda cause: str(cause["cause"]))
    return checks, causes, data["counts"], data["verdict"], data["exit_status"]


def _states(report: Path) -> list[tuple[str, str, list[str]]]:
    return [
        (check["nodeid"], check["outcome"], [finding["rule"] for finding in check["findings"]])
        for check in json.loads(report.read_text())["checks"]
    ]


def test_an_unreadable_line_and_a_masked_eos_end_alike_on_every_front(golden: Run, pytester: pytest.Pytester) -> None:
    _write_rows(pytester.path / "rows.jsonl")
    assert golden(*WORDS, "--mistral-report=pytest.json").ret == 1
    assert main(["check", "rows.jsonl", "--tokenizer", str(FILE), "--report", "check.json"]) == 1
    assert _states(Path("check.json")) == _states(Path("pytest.json"))
    assert {rule for *_, rules in _states(Path("pytest.json")) for rule in rules} == {"ML501", "ML546"}


@pytest.mark.slow
def test_two_workers_report_what_one_process_reports(golden: Run, pytester: pytest.Pytester) -> None:
    _write_rows(pytester.path / "rows.jsonl")
    assert golden(*WORDS, "--mistral-report=one.json").ret == 1
    assert golden(*WORDS, "--mistral-report=two.json", "-n", "2").ret == 1
    assert _content(Path("one.json")) == _content(Path("two.json"))
