"""A run by the rules of an earlier version: what is newer is a note, and the exit code is as it was."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import record_rules
from check_outcomes import outcome_of
from check_verb import check
from dataset_recipes import said, write_rows

from pytest_mistral_lora.assertions import assert_encoded_rows_sound, assert_labels_exact
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance import finding as rules_module
from pytest_mistral_lora.conformance.baseline import baseline_text
from pytest_mistral_lora.conformance.bounded_findings import SHOWN, BoundedFindings
from pytest_mistral_lora.conformance.checks import Check, Settings
from pytest_mistral_lora.conformance.dataset import file_faults
from pytest_mistral_lora.conformance.encoded import row_faults
from pytest_mistral_lora.conformance.encoded.fault import EncodingFault
from pytest_mistral_lora.conformance.finding import RULES, Finding, Result, _read_rules, first_findings
from pytest_mistral_lora.conformance.known import Xfail
from pytest_mistral_lora.conformance.outcome import CheckOutcome
from pytest_mistral_lora.conformance.rule_set import RuleSet, newest_rules
from pytest_mistral_lora.conformance.session import Session
from pytest_mistral_lora.conformance.targets import Target
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.judging import audit, judge
from pytest_mistral_lora.places import NOWHERE

OLD = RuleSet("0.1")
ROWS = [said(f"Why is {number} odd?", f"It has {number} as its half.") for number in range(1, 40)]
NOT_A_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "bot", "content": "Hello"}]}
TAGS = [said(f"And {number}?", f"No, {number} is even.</s>") for number in range(3)]


def patch_rule(monkeypatch: pytest.MonkeyPatch, rule: str, **values: Any) -> None:
    """Change a rule as a later version would."""
    monkeypatch.setitem(_read_rules(RULES[rule].subject), rule, replace(RULES[rule], **values))


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version that has added ML601, and has tightened the bound of ML639."""
    patch_rule(monkeypatch, "ML601", since="0.2")
    [before] = [fault for fault in file_faults._SIGNS if fault.name == "rendered"]
    tighter = replace(before, error=file_faults.Bound(2, 0.05))
    monkeypatch.setattr(file_faults, "_SIGNS", (*(one for one in file_faults._SIGNS if one != before), tighter))
    made = file_faults.FaultyRows.finding

    def finding(self: file_faults.FaultyRows) -> Finding:
        is_new = self.fault is tighter and not before.severity(self.count.rows, self.of)
        return replace(made(self), since="0.2") if is_new else made(self)

    monkeypatch.setattr(file_faults.FaultyRows, "finding", finding)


def newer_of(out: str) -> list[tuple[str, str, str]]:
    findings = [found for one in json.loads(out)["checks"] for found in one["findings"]]
    return sorted((one["rule"], one["severity"], one["error_from"]) for one in findings if one["since"] != "0.1")


def test_an_added_rule_and_a_tightened_one_are_notes_by_the_rules_before(
    later: None, tmp_path: Path, capsys: Any
) -> None:
    words = (str(write_rows(tmp_path / "rows.jsonl", [*ROWS, *TAGS, NOT_A_ROW])), "--tokenizer", "spm-v3", "--no-cache")
    code, out = check(capsys, *words, "--json")
    assert (code, newer_of(out)) == (1, [("ML601", "error", ""), ("ML639", "error", "")])
    code, out = check(capsys, *words, "--json", "--rules", "0.1")
    assert (code, newer_of(out)) == (0, [("ML601", "note", "0.2"), ("ML639", "note", "0.2")])
    code, out = check(capsys, *words, "--rules", "0.1")
    assert (code, out.count("  rules:    an error from 0.2 on\n")) == (0, 2)
    assert "rules of 0.1: 2 notes " in out


def test_what_the_rules_before_find_still_fails(later: None, tmp_path: Path, capsys: Any) -> None:
    tags = [said(f"And {number}?", f"No, {number} is even.</s>") for number in range(12)]
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, *tags])
    code, out = check(capsys, str(path), "--tokenizer", "spm-v3", "--no-cache", "--rules", "0.1")
    assert (code, "ML639 " in out, "an error from 0.2" in out) == (1, True, False)


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
    assert run_pytest(*words, *chosen, "--mistral-strict").ret == pytest.ExitCode.OK
    (tmp_path / "pytest.ini").write_text("[pytest]\nmistral_rules = 0.0\n")
    result = run_pytest(*words, *chosen)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert any("mistral_rules in " in line and "'0.0'" in line and "0.1" in line for line in result.errlines)


@pytest.mark.parametrize("verb", ["check", "audit"])
def test_encoded_rows_are_judged_by_the_rules_before(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ids = [1, 3, 16127, 4, 23325, 2]
    row = {**said("Hi", "Hello"), "input_ids": ids, "labels": [*[-100] * 4, 23325, -100]}
    path = write_rows(tmp_path / "encoded.jsonl", [row] * 30)
    words = [verb, str(path), "--tokenizer", "spm-v3", *(["--no-cache"] if verb == "check" else [])]
    assert (main(words), main([*words, "--rules", "0.1"])) == (1, 1)
    monkeypatch.setattr(row_faults, "EncodingFault", partial(EncodingFault, since="0.2"))
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
    with pytest.raises(InputError, match=r'^rules=: 0\.1 .* expected a text, such as "0\.1"'):
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
    docs = Path(record_rules.ROOT, "docs")
    lines = [line for page in docs.glob("*.md") for line in page.read_text().splitlines() if command[:-3] in line]
    versions = [version for line in lines for version in re.findall(r"--(?:mistral-)?rules[= ](\d[\d.]*\d)", line)]
    assert set(versions) == {newest_rules()}


@pytest.mark.parametrize("version", ["0.0", "1", "", "newest", "0.1.0"])
def test_a_version_that_is_not_recorded_is_refused(version: str, capsys: Any) -> None:
    with pytest.raises(InputError, match=r"^--rules: .*; expected 0\.1") as caught:
        RuleSet.of(version, "--rules")
    assert repr(version) in str(caught.value)


def judged(*findings: Finding, rules: RuleSet | None = OLD, **options: Any) -> CheckOutcome:
    settings = Settings(1, None, "cpu", skip_training=True, golden_folders=(), update=False, shared_folder=Path())
    session = Session(list, settings, rules=rules, **options)
    return session.outcome_of(Check(Target("a", Path("a")), "dataset", "statistics", Result), Result(findings))


def test_a_newer_finding_fails_no_strict_run(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rule(monkeypatch, "ML644", since="0.2")
    assert RULES["ML644"].severity == "note"
    assert judged(Finding("ML644", "a"), rules=None, fails_notes=True).state == "failed"
    outcome = judged(Finding("ML644", "a"), Finding("ML601", "b", since="0.2"), fails_notes=True)
    assert (outcome.state, [one.severity for one in outcome.findings]) == ("passed", ["note", "note"])
    assert [one.from_version for one in outcome.findings] == ["a note from 0.2 on", "an error from 0.2 on"]
    assert "ML6" not in baseline_text([outcome], notes=True)
    assert judged(Finding("ML645", "a"), fails_notes=True).state == "failed"


def test_a_note_that_became_an_error_is_a_note_again(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_rule(monkeypatch, "ML601", error_since="0.3")
    [found] = judged(Finding("ML601", "a")).findings
    assert (found.severity, found.error_from, found.is_newer) == ("note", "0.3", False)
    assert judged(Finding("ML601", "a"), fails_notes=True).state == "failed"
    [found] = judged(Finding("ML601", "a", since="0.2")).findings
    assert (found.error_from, found.is_newer) == ("0.3", True)
    assert judged(Finding("ML601", "a"), rules=RuleSet("0.3")).state == "failed"
    assert judged(Finding("ML601", "a"), rules=RuleSet("0.10")).state == "failed"


def test_a_raised_note_is_no_sign_by_the_rules_before() -> None:
    [found] = judged(Finding("ML636", "a", severity="error", since="0.2")).findings
    assert (found.severity, found.is_raised, found.proof, found.is_sign) == ("note", True, "contradiction", False)


def test_a_finding_keeps_its_version_in_another_process_and_under_another_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = judged(Finding("ML601", "a", since="0.2"), Finding("ML601", "b"))
    assert CheckOutcome.from_json(json.loads(json.dumps(outcome.to_json()))) == outcome
    assert [one.severity for one in outcome.findings] == ["note", "error"]
    # a later rule takes over what an older one found
    patch_rule(monkeypatch, "ML602", since="0.2")
    assert Finding("ML602", "a").since == "0.2"
    [found] = judged(Finding("ML601", "a").under("ML602")).findings
    assert (found.rule, found.severity) == ("ML602", "error")


def test_a_newer_finding_is_known_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    xfail = Xfail("ML601", "looked at", "known.txt:1")
    outcome = judged(Finding("ML601", "a", since="0.2"), xfails=(xfail,))
    assert (outcome.state, outcome.findings, outcome.known) == ("passed", (), (xfail,))


@pytest.mark.parametrize(("old", "severities"), [(0, {"note"}), (1, {"note", "error"})])
def test_an_old_finding_is_not_hidden_behind_newer_ones(old: int, severities: set[str]) -> None:
    findings = [Finding("ML601", str(number), since="0.2") for number in range(SHOWN + 5)]
    findings += [Finding("ML601", "old")] * old
    bounded = BoundedFindings()
    for finding in findings:
        bounded.add(finding)
    for shown in (first_findings(findings, SHOWN, NOWHERE), bounded.of("ML601")):
        found = judged(*shown).findings
        assert {one.severity for one in found} == severities
        assert sum(one.more or 1 for one in found) == len(findings)


def test_a_newer_cause_that_stands_for_older_errors_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RULES["ML644"].severity == "note"
    cause = Finding("ML601", "a", since="0.2")
    for covered, severity in ((("ML602", 3), "error"), (("ML644", 3), "note")):
        [found] = judged(replace(cause, covers=(covered,))).findings
        assert found.severity == severity
    patch_rule(monkeypatch, "ML602", error_since="0.2")
    [found] = judged(replace(cause, covers=(("ML602", 3),))).findings
    assert found.severity == "note"


def test_the_error_of_a_cause_stands_for_its_newer_notes() -> None:
    outcome = judged(Finding("ML601", "aaa"), Finding("ML601", "a", since="0.2"))
    [cause] = record_causes(outcome)
    assert (cause.simplest.found, cause.simplest.severity, "from 0.2 on" in cause.headline()) == ("aaa", "error", False)


def record_causes(outcome: CheckOutcome) -> Any:
    from pytest_mistral_lora.conformance.groups import group_findings

    found = [replace(finding, shape="s") for finding in outcome.findings]
    return group_findings([outcome_of("a::dataset::statistics", *found)])


@pytest.mark.parametrize("line", ["", 'since = "1"', "since = 0.1", 'since = "0.2"\nerror_since = "next"'])
def test_a_rule_without_a_version_is_refused(line: str, tmp_path: Path) -> None:
    folder = Path(rules_module.__file__).parent / "rules"
    text = (folder / "manifest.toml").read_text().replace('since = "0.1"', line, 1)
    path = tmp_path / "manifest.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.toml: ML7\d\d\.(error_)?since: "):
        rules_module._rules_in(path, "manifest")


def problems(*rules: Any, numbers: dict[str, str] | None = None, **options: Any) -> list[str]:
    version, recorded = record_rules.last_recorded()
    now = {rule.id: rule for rule in (*RULES.values(), *rules)}.values()
    numbers = recorded["bounds"] if numbers is None else {**recorded["bounds"], **numbers}
    return record_rules.changes_without_since(version, recorded, now, numbers, **options)


def test_every_change_since_the_last_version_says_so() -> None:
    version, recorded = record_rules.last_recorded()
    numbers = dict(record_rules.bounds(record_rules.CHECKS))
    found = record_rules.changes_without_since(version, recorded, RULES.values(), numbers, looser=record_rules.LOOSER)
    assert found == [], "write since into the rule or its finding; before the release, run scripts/record_rules.py"


def test_a_change_without_a_version_is_found(tmp_path: Path) -> None:
    assert problems() == []
    new, note = replace(RULES["ML601"], id="ML699"), RULES["ML644"]
    assert [text.partition(":")[0] for text in problems(new)] == ["ML699"]
    assert problems(replace(new, since="0.2")) == []
    assert [text.partition(":")[0] for text in problems(replace(note, severity="error"))] == ["ML644"]
    assert problems(replace(note, severity="error", error_since="0.2")) == []
    assert [text.partition(":")[0] for text in problems(replace(note, since="0.2"))] == ["ML644"]
    # it finds less
    assert problems(replace(RULES["ML601"], severity="note")) == []
    version, recorded = record_rules.last_recorded()
    rules = [rule for rule in RULES.values() if rule.id != "ML601"]
    [gone] = record_rules.changes_without_since(version, recorded, rules, recorded["bounds"])
    assert gone.startswith("ML601: ")


def test_a_bound_that_changed_needs_a_finding_with_a_version(tmp_path: Path) -> None:
    checks = shutil.copytree(record_rules.CHECKS, tmp_path / "checks", ignore=shutil.ignore_patterns("__pycache__"))
    module = checks / "adapter" / "configuration.py"
    text = module.read_text().replace("LARGEST_SCALE = 32", "LARGEST_SCALE = 16")
    module.write_text(text)
    numbers = dict(record_rules.bounds(checks))
    [found] = problems(numbers=numbers, folder=checks)
    assert found.startswith("adapter.configuration:LARGEST_SCALE: 16; 0.1 recorded 32")
    assert problems(numbers=numbers, folder=checks, looser=["adapter.configuration:LARGEST_SCALE"]) == []
    module.write_text(text.replace('lora_alpha / r as in training"', 'lora_alpha / r as in training", since="0.2"'))
    assert problems(numbers=numbers, folder=checks) == []
    faults = checks / "dataset" / "file_faults.py"
    faults.write_text(faults.read_text().replace("Bound(10, 0.2)", "Bound(10, 0.1)"))
    [found] = problems(numbers=dict(record_rules.bounds(checks)), folder=checks)
    assert found.startswith("dataset.file_faults:same_answer ML644: Bound(10, 0.1); ")
