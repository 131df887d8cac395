"""One fault in a template fails many checks, and is one finding in pytest's output."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from check_outcomes import outcome_of
from cut_sentencepiece import cut_v3

from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.plugin.summary import OUTCOME, FailedChecks

Run = Callable[..., pytest.RunResult]
CASES = ("astral", "cjk", "hostile-user", "multi-turn", "repeated-text", "single")
SIMPLEST = "single"
IN_WORDS = "after [INST]: ␣ → nothing"


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose template lacks the space after [INST]."""
    file = cut_v3()
    folder = tmp_path_factory.mktemp("broken") / "model"
    CheckpointTokenizer(file).fast.save_pretrained(folder)
    shutil.copy(file, folder)
    template = folder / "chat_template.jinja"
    assert "'[INST] '" in template.read_text()
    template.write_text(template.read_text().replace("'[INST] '", "'[INST]'"))
    return folder


@pytest.fixture
def run(golden: Run, broken: Path) -> Run:
    def run(*args: str, cases: tuple[str, ...] = CASES) -> pytest.RunResult:
        chosen = " or ".join(f"model::template::{case}" for case in cases)
        return golden(f"--mistral-tokenizer={broken}", "-k", chosen, *args)

    return run


def _section(result: pytest.RunResult, title: str) -> list[str]:
    lines = result.outlines
    start = next(n for n, line in enumerate(lines) if line.startswith("===") and f" {title} " in line)
    end = next(n for n, line in enumerate(lines) if n > start and line.startswith("==="))
    return lines[start + 1 : end]


@pytest.mark.parametrize("workers", [(), pytest.param(("-n2",), marks=pytest.mark.slow)], ids=["one process", "two"])
def test_one_cause_is_one_finding_by_its_simplest_row(run: Run, workers: tuple[str, ...]) -> None:
    if workers:
        pytest.importorskip("xdist")
    result = run(*workers)
    assert result.parseoutcomes()["failed"] == len(CASES)
    findings = _section(result, "Mistral findings")
    assert findings[0].strip("_ ") == f"model::template::{SIMPLEST}"
    assert findings[1].startswith("ML004 /")
    assert "/chat_template.jinja: " in findings[1]
    assert findings[1].endswith(IN_WORDS)
    assert sum(line.startswith("ML004 ") for line in findings) == 1
    others = ", ".join(case for case in CASES if case != SIMPLEST)
    assert f"and {len(CASES) - 1} more like it: model::template: {others}" in findings
    assert findings[-1].endswith(f"-k model::template::{SIMPLEST}")
    [line] = _section(result, "short test summary info")
    assert line.startswith("ML004 ")
    assert f"{IN_WORDS} ({len(CASES)} findings)" in line
    assert len(line) <= 120
    assert "FAILURES" not in result.stdout.str()


def test_the_tokens_stand_beside_each_other_with_the_one_that_is_missing(run: Run) -> None:
    table = [line.split() for line in _section(run(cases=("single",)), "Mistral findings") if line.startswith("  ")]
    start = table.index(["token", "expected", "label", "token", "found", "label"])
    assert table[start + 1 : start + 5] == [
        ["0", "1", "<s>", "-100", "0", "1", "<s>", "-100"],
        ["1", "3", "[INST]", "-100", "1", "3", "[INST]", "-100"],
        [">", "2", "2531", "'␣What'", "-100", "2", "2577", "'Wh'", "-100"],
        ["+", "3", "1038", "'at'", "-100"],
    ]


def test_a_log_of_ci_has_each_finding_once_and_no_line_is_cut(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = len(run().outlines)
    monkeypatch.setenv("CI", "true")
    result = run()
    assert len(result.outlines) == plain
    [line] = _section(result, "short test summary info")
    assert line.startswith("ML004 ")
    assert f"{IN_WORDS} ({len(CASES)} findings) - /" in line
    assert line.endswith("/chat_template.jinja")


def test_a_stopped_run_shows_its_one_finding_whole(run: Run) -> None:
    findings = _section(run("-x"), "Mistral findings")
    assert findings[0].strip("_ ") == f"model::template::{SIMPLEST}"
    assert [line for line in findings if line.startswith(("  row: ", "  rule: ", "  why: ", "  fix: "))]
    assert not [line for line in findings if "more like it" in line]


@pytest.mark.parametrize(("style", "lines"), [("no", 0), ("line", 1)])
def test_the_style_of_tracebacks_bounds_the_findings(style: str, lines: int, run: Run) -> None:
    result = run(f"--tb={style}")
    assert ("Mistral findings" in result.stdout.str()) == bool(lines)
    if lines:
        assert len(_section(result, "Mistral findings")) == lines
    assert len(_section(result, "short test summary info")) == 1


def test_each_check_keeps_its_report(run: Run, pytester: pytest.Pytester) -> None:
    result = run("--junitxml=junit.xml", "-v")
    for case in CASES:
        result.stdout.fnmatch_lines([f"mistral-golden::model::template::{case} FAILED*"])
    cases = {
        case.attrib["name"]: case.findtext("failure") or ""
        for case in ElementTree.parse(pytester.path / "junit.xml").iter("testcase")
    }
    assert len(cases) == len(CASES)
    first, *rest = cases.values()
    assert "  why: " in first
    for text in rest:
        assert text.splitlines()[1] == f"  same cause as mistral-golden::model::template::{SIMPLEST}"
        assert text.startswith("ML004 ")
    assert run("--lf").parseoutcomes()["failed"] == len(CASES)


def test_a_junit_file_and_a_workflow_get_rule_file_and_line(
    golden: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "::add-mask::x"}, {"role": "bot", "content": "y"}]}
    (pytester.path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    summary = pytester.path / "summary.md"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    words = ("--mistral-dataset=rows.jsonl", "--mistral-tokenizer=spm-v3", "-k", "rows-are-valid")
    result = golden(*words, "--junitxml=junit.xml")
    [case] = ElementTree.parse(pytester.path / "junit.xml").iter("testcase")
    properties = [(one.get("name"), one.get("value")) for one in case.iter("property")]
    assert properties == [("rule", "ML601"), ("file", "rows.jsonl"), ("line", "1")]
    commands = [line for line in result.outlines if line.startswith("::")]
    [annotation] = [line for line in commands if line.startswith("::error ")]
    assert annotation.startswith("::error file=rows.jsonl,line=1,title=ML601 ")
    assert commands == [annotation]
    assert summary.read_text().startswith("## pytest \\-\\-mistral\\-golden\n")
    assert "| `mistral-golden.rows.jsonl.dataset` | - | 1 | - |" in summary.read_text()


def test_errors_without_a_finding_are_the_same_only_if_their_texts_are() -> None:
    failed = FailedChecks(fails_notes=False)
    texts = []
    for case, text in (("a", "no server\n  expected: one"), ("b", "no disk"), ("c", "no server\n  expected: one")):
        report = pytest.TestReport(f"mistral-golden::{case}", ("", None, ""), {}, "failed", text, "call")
        vars(report)[OUTCOME] = outcome_of(f"a::dataset::{case}", state="failed")
        failed.pytest_runtest_logreport(report)
        texts.append(report.longrepr)
    assert texts == ["no server\n  expected: one", "no disk", "no server\n  same cause as mistral-golden::a"]


def test_the_user_s_own_failure_keeps_its_place(run: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine="def test_template(): assert 1 == 2")
    result = run(".", cases=(*CASES, "x or test_template"))
    assert result.parseoutcomes()["failed"] == len(CASES) + 1
    first, second = _section(result, "short test summary info")
    assert first.startswith("FAILED test_mine.py::test_template - ")
    assert second.startswith("ML004 ")
    assert [line for line in _section(result, "FAILURES") if line.startswith("____")] == [
        line for line in _section(result, "FAILURES") if " test_template " in line
    ]


def test_colour_is_pytest_s_choice(run: Run) -> None:
    cases = ("single",)
    assert re.search(r"\x1b\[33m  >     2 ", run("--color=yes", cases=cases).stdout.str())
    assert "\x1b[" not in run("--color=no", cases=cases).stdout.str()


def test_the_report_lists_the_causes(run: Run, tmp_path: Path) -> None:
    for name in ("x.json", "x.html"):
        run(f"--mistral-report={tmp_path / name}")
    data: Any = json.loads((tmp_path / "x.json").read_text())
    [cause] = data["causes"]
    assert (cause["rule"], cause["check"], cause["count"]) == ("ML004", f"model::template::{SIMPLEST}", len(CASES))
    assert sorted(cause["others"]) == [f"model::template::{case}" for case in CASES if case != SIMPLEST]
    assert cause["shape"] == "after [INST]: ␣ → nothing"
    page = (tmp_path / "x.html").read_text()
    assert page.count("after [INST]: &#39;What is the capital of France?") == 1
    assert f"{len(CASES) - 1} more like it" in page


OWN_TESTS = """
    from pytest_mistral_lora import audit, judge

    ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    IDS = {"input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [-100] * 4 + [23325, -100]}

    def test_call():
        assert audit([ROW | IDS], tokenizer="spm-v3")

    def test_name():
        verdict = audit([ROW | IDS], tokenizer="spm-v3")
        assert verdict.ok

    def test_raised():
        audit([ROW | IDS], tokenizer="spm-v3").raise_for_findings()

    def test_input():
        judge("nope")
"""


def test_the_verdict_of_a_failed_test_is_a_section_of_its_report(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(OWN_TESTS)
    result = pytester.runpytest_inprocess()
    lines = result.outlines
    result.assert_outcomes(failed=4)
    titles = [line.strip("_- ") for line in lines if re.fullmatch(r"([_-]) ?\1.* \1+", line)]
    test, section = "Mistral verdict", ["test_call", "test_name", "test_raised", "test_input"]
    shown = [title for title in titles if title in (test, *section)]
    assert shown == ["test_call", test, "test_name", test, "test_raised", "test_input"]
    assert sum(line.endswith("ML546 rows[0]: the EOS of turn 1 is masked") for line in lines) == 3
    # the frames of the package are those of --full-trace
    assert not any("judging.py" in line for line in lines)
    assert any("judging.py" in line for line in pytester.runpytest_inprocess("--full-trace", "-ktest_input").outlines)
