"""After an upgrade, one line of the summary has the changes of the rules since the last green run of the targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from check_verb import check
from dataset_recipes import said, write_rows

from pytest_mistral_lora.conformance import session as session_module
from pytest_mistral_lora.conformance import upgrade
from pytest_mistral_lora.conformance.finding import FORMER_RULES, RULES, Finding, FormerRule, _read_rules
from pytest_mistral_lora.conformance.kept_results import KeptResults
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.report import report_file

RunPytest = Callable[..., pytest.RunResult]
SOUND = [said(f"Why is {number} odd?", f"It has {number} as its half.") for number in range(1, 9)]
BROKEN = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
LINE = "since the last green run, with version 0.1.0: "
CHANGES = "renamed: ML999 is ML623; notes that are errors now: ML637; rules that find more: ML601; new rules: ML602"


@pytest.fixture
def upgraded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns the upgrade: one rule is new, one was a note, and one has another id."""

    def upgrade_now() -> None:
        rules = _read_rules("dataset")
        monkeypatch.setitem(rules, "ML602", replace(RULES["ML602"], since="0.2"))
        monkeypatch.setitem(rules, "ML637", replace(RULES["ML637"], severity="error", error_since="0.2"))
        monkeypatch.setitem(FORMER_RULES, "ML999", FormerRule(("ML623",), "ids", "0.2"))
        for module in (session_module, report_file):
            monkeypatch.setattr(module, "__version__", "0.2.0")

    return upgrade_now


def lines_of(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("since the last green run")]


def test_changes_are_listed_by_kind(upgraded: Callable[[], None]) -> None:
    assert upgrade.changes_since("0.1.0", []) == ""
    upgraded()
    assert upgrade.changes_since("0.1.0", [Finding("ML601", "a", since="0.2"), Finding("ML603", "b")]) == CHANGES
    assert upgrade.changes_since("0.2.0", [Finding("ML601", "a", since="0.2")]) == ""
    assert upgrade.changes_since("", []) == ""


def test_many_rules_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for rule in RULES.of("manifest"):
        monkeypatch.setitem(_read_rules("manifest"), rule.id, replace(rule, since="0.2"))
    number = len(RULES.of("manifest"))
    assert upgrade.changes_since("0.1.3.dev2", []).endswith(f" and {number - 5} more")


def test_the_last_green_run_is_that_of_the_cache(
    upgraded: Callable[[], None], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = (str(write_rows(tmp_path / "rows.jsonl", SOUND)), "--tokenizer", "spm-v3", "--cache", "kept")
    for _ in range(2):
        code, out = check(capsys, *words)
        assert (code, lines_of(out)) == (0, [])
    write_rows(tmp_path / "rows.jsonl", [*SOUND, BROKEN])
    upgraded()
    # a red run changes nothing: the next one has the line, too
    for _ in range(2):
        code, out = check(capsys, *words, "--examples", "1")
        [line] = lines_of(out)
        assert (code, line.startswith(LINE), "notes that are errors now: ML637" in line) == (1, True, True)
    # other targets were not green
    write_rows(tmp_path / "other.jsonl", [*SOUND, BROKEN])
    assert lines_of(check(capsys, str(tmp_path / "other.jsonl"), *words[1:])[1]) == []


def test_a_kept_version_that_somebody_else_wrote_is_not_read(tmp_path: Path) -> None:
    targets = [Target("a", tmp_path)]
    KeptResults(tmp_path / "kept").keep_green(targets)
    assert KeptResults(tmp_path / "kept").green_version(targets) == "0.1.0"
    assert KeptResults(tmp_path / "kept").green_version([*targets, Target("b", tmp_path)]) == ""
    [file] = (tmp_path / "kept").iterdir()
    data = json.loads(file.read_text())
    data["content"]["version"] = "0.0.1"
    file.write_text(json.dumps(data))
    assert KeptResults(tmp_path / "kept").green_version(targets) == ""


def test_the_last_green_run_is_that_of_the_earlier_report(
    upgraded: Callable[[], None], tmp_path: Path, capsys: Any
) -> None:
    report = tmp_path / "report.json"
    path = write_rows(tmp_path / "rows.jsonl", SOUND)
    words = (str(path), "--tokenizer", "spm-v3", "--no-cache", "--report", str(report))
    assert check(capsys, *words)[0] == 0
    assert json.loads(report.read_text())["last_green"] == "0.1.0"
    write_rows(path, [*SOUND, BROKEN])
    upgraded()
    for _ in range(2):
        code, out = check(capsys, *words)
        assert (code, len(lines_of(out))) == (1, 1)
        data = json.loads(report.read_text())
        assert (data["pytest_mistral_lora"], data["last_green"]) == ("0.2.0", "0.1.0")
    write_rows(path, SOUND)
    code, out = check(capsys, *words)
    assert (code, len(lines_of(out)), json.loads(report.read_text())["last_green"]) == (0, 1, "0.2.0")
    assert lines_of(check(capsys, *words)[1]) == []


def test_pytest_has_the_line_too(upgraded: Callable[[], None], run_pytest: RunPytest, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", SOUND)
    words = ("--mistral-golden", "--mistral-dataset=rows.jsonl", "--mistral-tokenizer=spm-v3", "-k", "rows-are-valid")
    words = (*words, "--mistral-report=report.json")
    assert lines_of(run_pytest(*words).stdout.str()) == []
    upgraded()
    result = run_pytest(*words)
    [line] = lines_of(result.stdout.str())
    assert (result.ret, line.startswith(LINE)) == (pytest.ExitCode.OK, True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checks": 1}', '{"checks": [{"target": "a"}], "exit_status": 0}'])
def test_a_file_that_is_no_report_says_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    assert upgrade.green_version(tmp_path / "report.json", ["a"]) == ""


def test_a_report_of_other_targets_says_nothing(tmp_path: Path) -> None:
    report = {"pytest_mistral_lora": "0.1.0", "exit_status": 0, "checks": [{"target": "a"}]}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert upgrade.green_version(tmp_path / "report.json", ["a"]) == "0.1.0"
    assert upgrade.green_version(tmp_path / "report.json", ["a", "b"]) == ""
    assert upgrade.green_version(tmp_path / "report.json", []) == ""
