"""A run by the rules of an earlier version: what is newer is a note, and the exit code is as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from check_verb import check
from dataset_recipes import said, write_rows

from pytest_mistral_lora.assertions import assert_encoded_rows_sound, assert_labels_exact
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance import finding as rules_module
from pytest_mistral_lora.conformance.check_options import CheckOptions
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result, _read_rules
from pytest_mistral_lora.conformance.known import Xfail
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.rule_set import RuleSet, newest_rules
from pytest_mistral_lora.conformance.session import Session
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.conformance.written_xfails import xfails_text
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.judging import audit, judge

OLD = RuleSet("0.1")
ROWS = [said(f"Why is {number} odd?", f"It has {number} as its half.") for number in range(1, 40)]
NOT_A_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
LATER = ("ML601", "ML639")
TAGS = [said(f"And {number}?", f"No, {number} is even.</s>") for number in range(12)]


def patch_rule(monkeypatch: pytest.MonkeyPatch, rule: str, **values: Any) -> None:
    """Change a rule as a later version would."""
    monkeypatch.setitem(_read_rules(RULES[rule].subject), rule, replace(RULES[rule], **values))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that has added ML601, and in which ML639 became an error."""
    patch_rule(monkeypatch, "ML601", since="0.2")
    patch_rule(monkeypatch, "ML639", severity="error", error_since="0.2")


def newer_of(out: str) -> list[tuple[str, str, str]]:
    findings = [found for one in json.loads(out)["checks"] for found in one["findings"]]
    return sorted((one["rule"], one["severity"], one["error_from"]) for one in findings if one["rule"] in LATER)


def test_an_added_rule_and_a_raised_one_are_notes_by_the_rules_before(later: None, tmp_path: Path, capsys: Any) -> None:
    words = (str(write_rows(tmp_path / "rows.jsonl", [*ROWS, *TAGS, NOT_A_ROW])), "--tokenizer", "spm-v3", "--no-cache")
    code, out = check(capsys, *words, "--json")
    assert (code, newer_of(out)) == (1, [("ML601", "error", ""), ("ML639", "error", "")])
    code, out = check(capsys, *words, "--json", "--rules", "0.1")
    assert (code, newer_of(out)) == (0, [("ML601", "note", "0.2"), ("ML639", "note", "0.2")])
    code, out = check(capsys, *words, "--rules", "0.1")
    assert (code, out.count("  rules:    an error from 0.2 on\n")) == (0, 2)
    assert "rules of 0.1: 2 notes " in out


def test_pytest_takes_the_version_from_its_option_or_its_ini_file(
    later: None, pytester: pytest.Pytester, run_pytest: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", [*ROWS, NOT_A_ROW])
    words = ("--mistral-golden", "--mistral-dataset=rows.jsonl", "--mistral-tokenizer=spm-v3")
    chosen = ("-k", "rows-are-valid")
    result = run_pytest(*words, *chosen)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result = run_pytest(*words, *chosen, "--mistral-rules=0.1")
    assert result.ret == pytest.ExitCode.OK
    [line] = [line for line in result.outlines if line.startswith("note ML601 ")]
    assert "(an error from 0.2 on)" in line
    (tmp_path / "pytest.ini").write_text("[pytest]\nmistral_rules = 0.1\n")
    assert run_pytest(*words, *chosen, "--mistral-fail-on=note,not-checked").ret == pytest.ExitCode.OK
    (tmp_path / "pytest.ini").write_text("[pytest]\nmistral_rules = 0.0\n")
    result = run_pytest(*words, *chosen)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any("mistral_rules in " in line and "'0.0'" in line and "0.1" in line for line in result.errlines)


def test_encoded_rows_are_judged_by_the_rules_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ids = [1, 3, 16127, 4, 23325, 2]
    row = {**said("Hi", "Hello"), "input_ids": ids, "labels": [*[-100] * 4, 23325, -100]}
    path = write_rows(tmp_path / "encoded.jsonl", [row] * 30)
    words = ["check", str(path), "--tokenizer", "spm-v3"]
    assert (main(words), main([*words, "--rules", "0.1"])) == (1, 1)
    for rule in RULES.of("encoded"):
        patch_rule(monkeypatch, rule.id, since="0.2")
    # more findings than `check` keeps: the rest are as new as these
    assert (main(words), main([*words, "--rules", "0.1"])) == (1, 0)
    out = capsys.readouterr().out
    assert "rules of 0.1: 1 note " in out


def test_the_suite_from_python_takes_the_version(later: None, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, NOT_A_ROW])
    assert not judge(path, tokenizer="spm-v3").ok
    verdict = judge(path, tokenizer="spm-v3", rules="0.1")
    assert (verdict.ok, [found.error_from for found in verdict.findings]) == (True, ["0.2"])
    assert '<dd class="note">note, an error from 0.2 on</dd>' in verdict.write(tmp_path / "report.html").read_text()
    with pytest.raises(InputError, match=r"^rules=: "):
        judge(path, tokenizer="spm-v3", rules="0.9")
    number: Any = 0.1
    with pytest.raises(InputError, match=r'^rules=: 0\.1 .* expected a text, such as "0\.\d"'):
        judge(path, tokenizer="spm-v3", rules=number)


def test_each_front_in_python_takes_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**said("Hi", "Hello"), "input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [*[-100] * 5, 2]}
    ids = (row["input_ids"], row["labels"], "spm-v3")
    assert not audit([row], tokenizer="spm-v3", rules="0.1").ok
    with pytest.raises(AssertionError, match="ML545"):
        assert_labels_exact(row, *ids, rules="0.1")
    patch_rule(monkeypatch, "ML545", since="0.2")
    assert not audit([row], tokenizer="spm-v3").ok
    assert audit([row], tokenizer="spm-v3", rules="0.1").ok
    with pytest.raises(AssertionError, match="ML545"):
        assert_labels_exact(row, *ids)
    assert_labels_exact(row, *ids, rules="0.1")
    assert_encoded_rows_sound([row], "spm-v3", rules="0.1")
    with pytest.raises(InputError, match=r"^rules=: "):
        assert_labels_exact(row, *ids, rules="0.9")


@pytest.mark.parametrize("command", ["--rules 0.1", "--mistral-rules=0.1"])
def test_the_documentation_names_the_last_version(command: str) -> None:
    docs = Path(__file__).parents[2] / "docs"
    lines = [line for page in docs.glob("*.md") for line in page.read_text().splitlines() if command[:-3] in line]
    versions = [version for line in lines for version in re.findall(r"--(?:mistral-)?rules[= ](\d[\d.]*\d)", line)]
    assert set(versions) == {newest_rules()}


@pytest.mark.parametrize("version", ["0.0", "1", "", "newest", "0.1.0"])
def test_a_version_that_no_rule_has_is_refused(version: str, capsys: Any) -> None:
    with pytest.raises(InputError, match=r"^--rules: .*; expected 0\.1") as caught:
        RuleSet.of(version, "--rules")
    assert repr(version) in str(caught.value)


NOTES = frozenset({"note"})


def judged(*findings: Finding, rules: RuleSet | None = OLD, **decided: Any) -> CheckOutcome:
    settings = Settings(1, None, "cpu", skip_training=True, golden_folders=(), update=False, shared_folder=Path())
    session = Session(list, settings, CheckOptions(rules=rules, **decided))
    return session.outcome_of(Check(Target("a", Path("a")), "dataset", "statistics", Result), Result(findings))


def test_a_newer_finding_fails_no_strict_run(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rule(monkeypatch, "ML644", since="0.2")
    patch_rule(monkeypatch, "ML601", since="0.2")
    assert RULES["ML644"].severity == "note"
    assert judged(Finding("ML644", "a"), rules=None, fail_on=NOTES).state == "failed"
    outcome = judged(Finding("ML644", "a"), Finding("ML601", "b"), fail_on=NOTES)
    assert (outcome.state, [one.severity for one in outcome.findings]) == ("passed", ["note", "note"])
    assert [one.from_version for one in outcome.findings] == ["a note from 0.2 on", "an error from 0.2 on"]
    assert "ML6" not in xfails_text([outcome], CheckOptions(fail_on=NOTES))
    assert judged(Finding("ML645", "a"), fail_on=NOTES).state == "failed"


def test_a_note_that_became_an_error_is_a_note_again(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rule(monkeypatch, "ML601", error_since="0.3")
    [found] = judged(Finding("ML601", "a")).findings
    assert (found.severity, found.error_from, found.is_newer) == ("note", "0.3", False)
    assert judged(Finding("ML601", "a"), fail_on=NOTES).state == "failed"
    patch_rule(monkeypatch, "ML601", since="0.2")
    [found] = judged(Finding("ML601", "a")).findings
    assert (found.error_from, found.is_newer) == ("0.3", True)
    assert judged(Finding("ML601", "a"), rules=RuleSet("0.3")).state == "failed"
    assert judged(Finding("ML601", "a"), rules=RuleSet("0.10")).state == "failed"


def test_a_raised_note_is_no_sign_by_the_rules_before(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rule(monkeypatch, "ML636", since="0.2")
    [found] = judged(Finding("ML636", "a", severity="error")).findings
    assert (found.severity, found.is_raised, found.proof, found.is_sign) == ("note", True, "contradiction", False)


def test_a_finding_keeps_its_version_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rule(monkeypatch, "ML601", since="0.2")
    outcome = judged(Finding("ML601", "a"), Finding("ML602", "b"))
    assert CheckOutcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    assert [one.severity for one in outcome.findings] == ["note", "error"]


def test_a_newer_finding_is_known_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    xfail = Xfail("ML601", "looked at", "known.txt:1")
    patch_rule(monkeypatch, "ML601", since="0.2")
    outcome = judged(Finding("ML601", "a"), xfails=(xfail,))
    assert (outcome.state, outcome.findings, outcome.known) == ("passed", (), (xfail,))


def test_a_newer_cause_that_stands_for_older_errors_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RULES["ML644"].severity == "note"
    patch_rule(monkeypatch, "ML601", since="0.2")
    cause = Finding("ML601", "a")
    for covered, severity in ((("ML602", 3), "error"), (("ML644", 3), "note")):
        [found] = judged(replace(cause, covers=(covered,))).findings
        assert found.severity == severity
    patch_rule(monkeypatch, "ML602", error_since="0.2")
    [found] = judged(replace(cause, covers=(("ML602", 3),))).findings
    assert found.severity == "note"


@pytest.mark.parametrize("line", ["", 'since = "1"', "since = 0.1", 'since = "0.2"\nerror_since = "next"'])
def test_a_rule_without_a_version_is_refused(line: str, tmp_path: Path) -> None:
    folder = Path(rules_module.__file__).parent / "rules"
    text = (folder / "manifest.toml").read_text().replace('since = "0.1"', line, 1)
    path = tmp_path / "manifest.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.toml: ML7\d\d\.(error_)?since: "):
        rules_module._rules_in(path, "manifest")
