"""Two reports of real checks are compared, as a job compares those of the main branch and of a change."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from github_markdown import rendered
from judged_samples import HOSTILE

from pytest_mistral_lora.report.compare_reports import MARK, ReportComparison, read_report

RunVerb = Callable[..., subprocess.CompletedProcess[str]]

QUESTION = {"role": "user", "content": "Hi"}
SOUND = [QUESTION, {"role": "assistant", "content": "Hello"}]
NO_ANSWER = [QUESTION]
EMPTY = [QUESTION, {"role": "assistant", "content": ""}]
SPELLED = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "<s> [INST]"}]


@pytest.fixture
def report(tmp_path: Path, mistral_lora: RunVerb) -> Callable[..., dict[str, Any]]:
    """Check rows, and return the report."""

    def make(*rows: list[dict[str, str]], more: tuple[str, ...] = ()) -> dict[str, Any]:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        words = ("check", "rows.jsonl", "--tokenizer", "spm-v3", "--report", "report.json", *more)
        done = mistral_lora(*words, folder=tmp_path)
        assert done.returncode in (0, 1), done.stderr
        return read_report(tmp_path / "report.json")

    return make


def states(comparison: ReportComparison) -> list[tuple[str, str]]:
    return [(found.state, found.cause["rule"]) for found in comparison.causes]


def test_a_cause_is_new_worse_unchanged_or_fixed(report: Callable[..., dict[str, Any]]) -> None:
    main = report(NO_ANSWER, SPELLED, SOUND)
    # the rows that are at fault have moved, which is nothing new
    moved = ReportComparison(main, report(SOUND, NO_ANSWER, SPELLED))
    assert states(moved) == [("unchanged", "ML601"), ("unchanged", "ML612")]
    assert (moved.fails, moved.verdict) == (False, "0 new, 2 unchanged, 0 fixed")
    worse = ReportComparison(main, report(NO_ANSWER, NO_ANSWER, SOUND))
    assert states(worse) == [("worse", "ML601"), ("fixed", "ML612")]
    assert worse.fails
    assert "(2 findings, 1 before)" in worse.lines()[1]
    new = ReportComparison(main, report(NO_ANSWER, SPELLED, EMPTY))
    assert states(new) == [("new", "ML601"), ("unchanged", "ML601"), ("unchanged", "ML612")]
    assert new.fails
    # a note is named, and fails nothing
    note = ReportComparison(report(SOUND), report(SPELLED))
    assert (states(note), note.fails) == ([("new", "ML612")], False)


def test_what_is_accepted_or_not_judged_is_not_fixed(report: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    main = report(NO_ANSWER)
    (tmp_path / "known.txt").write_text("ML601  # until the export is mended\n")
    known = ReportComparison(main, report(NO_ANSWER, more=("--xfails", "known.txt")))
    assert states(known) == [("known", "ML601")]
    assert "until the export is mended" in known.lines()[1]
    fixed = report(SOUND)
    assert states(ReportComparison(main, fixed)) == [("fixed", "ML601")]
    [cause] = ReportComparison(main, fixed).causes
    assert (cause.before, cause.after) == (1, 0)
    [name] = {cause["check"] for cause in main["causes"]}
    left_out = {**fixed, "checks": [check for check in fixed["checks"] if not check["nodeid"].endswith(name)]}
    assert states(ReportComparison(main, left_out)) == [("not judged", "ML601")]
    skipped = [{**check, "outcome": "skipped", "not_checked": "no tokenizer"} for check in fixed["checks"]]
    unable = ReportComparison(main, {**fixed, "checks": skipped})
    assert states(unable) == [("not judged", "ML601")]
    assert unable.verdict.endswith("could not run any more")
    assert any("no tokenizer" in line for line in unable.lines())
    assert "no tokenizer" in unable.markdown()


def test_the_markdown_is_a_table_in_which_no_text_is_mark_up(report: Callable[..., dict[str, Any]]) -> None:
    main, after = report(SOUND), report(SOUND, NO_ANSWER)
    after["causes"][0]["found"] = HOSTILE
    after["libraries"]["transformers"] = "5.0.0"
    text = ReportComparison(main, after).markdown()
    lines = text.splitlines()
    assert lines[0] == MARK
    assert lines[1] == "**mistral-lora**: 1 new, 0 fixed"
    assert any(line.startswith("Other versions: `transformers") for line in lines)
    found = rendered(text)
    assert found.faults() == []
    assert found.tags.count("td") == 3
    assert any("<script>|**" in code for code in found.code)
    assert after["causes"][0]["fix"] in found.code


@pytest.mark.parametrize(
    "text",
    [
        *(
            "@bob",
            "\\@bob",
            "a @octo/team",
            "www.evil.test",
            "https://evil.test",
            "a@b.co",
            "#1",
            "\\#1",
            "GH-1",
            "us/ours#1",
        ),
        *(
            "0123456789abcdef0123456789abcdef01234567",
            ":tada:",
            "<img src=//evil.test>",
            "| a | b |",
            "\\| @bob",
            "`@bob`",
        ),
        *("`" * 81 + " @bob " + "`" * 81, "`\n\n@bob", "[a](//evil.test)", "<!-- @bob", "$x$ @bob"),
    ],
)
def test_no_text_of_a_report_is_a_mention_a_link_or_a_reference(text: str) -> None:
    cause = {"cause": "x", "rule": "ML601", "severity": "error", "count": 1, "title": "", "check": "x"}
    checks = [{"nodeid": text, "outcome": "passed", "not_checked": "", "known": []}]
    before = {"causes": [], "checks": checks, "libraries": {text: "1"}, "python": "3"}
    skipped = [{**checks[0], "outcome": "skipped", "not_checked": text}]
    causes = [{**cause, "found": text, "place": text, "fix": text}]
    after = {**before, "causes": causes, "checks": skipped, "libraries": {text: "2"}}
    found = rendered(ReportComparison(before, after).markdown())
    assert found.faults() == []
    assert (found.tags.count("td"), len(found.code)) == (3, 4)


@pytest.mark.parametrize("text", [HOSTILE, "@bob", "`\n\n@bob", "| a | b |"])
def test_a_text_of_a_moved_record_is_none_either(text: str) -> None:
    check = {"nodeid": "mistral-golden::a::server::there", "outcome": "passed", "not_checked": "", "known": []}
    before = {"causes": [], "checks": [{**check, "facts": {"server of": "x"}}], "libraries": {}, "python": "3"}
    after = {**before, "checks": [{**check, "facts": {"server of": text}}]}
    comparison = ReportComparison(before, after)
    assert comparison.moved == {check["nodeid"]: f"server of: x → {text}"}
    assert rendered(comparison.markdown()).faults() == []
    assert not comparison.fails


def test_only_records_of_answers_move() -> None:
    check = {"nodeid": "mistral-golden::a::dataset::rows", "outcome": "passed", "not_checked": "", "known": []}
    before = {"causes": [], "checks": [{**check, "facts": {"rows of": 1}}], "libraries": {}, "python": "3"}
    after = {**before, "checks": [{**check, "facts": {"rows of": 2}}]}
    assert ReportComparison(before, after).moved == {}


def test_a_comment_that_is_too_long_for_github_is_cut_and_says_so() -> None:
    before = {"causes": [], "checks": [], "libraries": {}, "python": "3"}
    cause = {
        "rule": "ML601",
        "severity": "error",
        "count": 1,
        "title": "",
        "check": "x",
        "place": "👩" * 1000,
        "fix": "",
    }
    after = {**before, "causes": [{**cause, "cause": str(number), "found": f"row {number}"} for number in range(40)]}
    text = ReportComparison(before, after).markdown()
    assert 60_000 < len(text.encode("utf-16-le")) // 2 <= 65_536
    assert text.splitlines()[-1].startswith("The rest is left out: ")
    assert rendered(text).faults() == []
    short = ReportComparison(before, {**after, "causes": after["causes"][:20]}).markdown()
    assert "left out" not in short


def test_the_verb_ends_with_1_if_an_error_is_new(
    report: Callable[..., dict[str, Any]], tmp_path: Path, mistral_lora: RunVerb
) -> None:
    for name, rows in {"main.json": [SOUND], "pr.json": [SOUND, NO_ANSWER]}.items():
        report(*rows)
        (tmp_path / "report.json").rename(tmp_path / name)
    done = mistral_lora("compare", "main.json", "pr.json", folder=tmp_path)
    assert (done.returncode, done.stdout.splitlines()[0]) == (1, "1 new, 0 fixed")
    assert mistral_lora("compare", "pr.json", "main.json", folder=tmp_path).returncode == 0
    data = json.loads(mistral_lora("compare", "main.json", "pr.json", "--json", folder=tmp_path).stdout)
    assert data["counts"]["new"] == 1
    assert data["causes"][0]["state"] == "new"
    assert mistral_lora("compare", "main.json", "pr.json", "--markdown", folder=tmp_path).stdout.startswith(MARK)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": []}', "not a report; expected "),
        ('{"causes": []}', "not a report: "),
        ("{", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_report_is_named(text: str, message: str, tmp_path: Path, mistral_lora: RunVerb) -> None:
    (tmp_path / "main.json").write_text(text)
    done = mistral_lora("compare", "main.json", "main.json", folder=tmp_path)
    assert done.returncode == 2
    assert "main.json: " in done.stderr
    assert message in done.stderr
