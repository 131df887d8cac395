from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from plugin_rows import ROW, write_rows

from pytest_mistral_lora import __version__
from pytest_mistral_lora.chat.oracle import shipped_tokenizer

SCHEMA = json.loads(files("pytest_mistral_lora.report").joinpath("report.schema.json").read_text(encoding="utf-8"))
Run = Callable[..., pytest.RunResult]
OwnRows = Callable[..., Path]
OTHERS = "  dataset, encoded, adapter, merged, manifest, transcript, gguf, server, runner: no target of that kind"
CHOSEN = ("-k", "spm-v1::tokenizer::file or spm-v1::template::own- or spm-v1::mask::mistral-common-agrees")


@pytest.fixture
def one_of_each(own_rows: OwnRows) -> tuple[str, ...]:
    return f"--mistral-golden-dir={own_rows({**ROW, 'name': 'new'})}", *CHOSEN


def _summary(result: pytest.RunResult) -> list[str]:
    lines = result.outlines
    start = next(n for n, line in enumerate(lines) if " Mistral conformance " in line)
    end = next(n for n, line in enumerate(lines) if n > start and line.startswith("==="))
    return [line for line in lines[start + 1 : end] if line]


def test_the_table_counts_each_target_and_subject_and_says_what_was_not_checked(
    golden: Run, one_of_each: tuple[str, ...], every_id: list[str]
) -> None:
    result = golden(*one_of_each)
    result.assert_outcomes(passed=1, failed=1, skipped=1, deselected=len(every_id) + 4)
    assert _summary(result) == [
        " target   subject     passed   failed   not checked",
        " ──────────────────────────────────────────────────",
        " spm-v1   tokenizer        1        -             -",
        " spm-v1   template         -        1             -",
        " spm-v1   mask             -        -             1",
        "not checked:",
        "  spm-v1: tokenizer v1: this law holds for v2 and later (1)",
        f"  {len(every_id) + 4} checks deselected",
        OTHERS,
        "next: mistral-lora rules ML007",
    ]


RERUNS = """
from _pytest.runner import runtestprotocol


def pytest_runtest_protocol(item, nextitem):
    for outcome in ("rerun", None):
        for report in runtestprotocol(item, nextitem=nextitem, log=False):
            report.outcome = outcome or report.outcome
            item.ihook.pytest_runtest_logreport(report=report)
    return True
"""


def test_an_attempt_that_is_repeated_is_counted_once(
    golden: Run, one_of_each: tuple[str, ...], pytester: pytest.Pytester
) -> None:
    """As pytest-rerunfailures repeats them."""
    plain = golden(*one_of_each)
    pytester.makeconftest(RERUNS)
    result = golden(*one_of_each)
    assert result.parseoutcomes()["rerun"] == 3
    assert _summary(result) == _summary(plain)


def test_a_train_that_is_left_out_is_named(golden: Run, every_id: list[str]) -> None:
    trains = sum("::train::" in nodeid for nodeid in every_id)
    result = golden("-k", "spm-v1::tokenizer::file", "--mistral-no-train")
    assert _summary(result)[-4:] == [
        "not checked:",
        f"  {len(every_id) - trains - 1} checks deselected",
        "  train: left out by --mistral-no-train",
        OTHERS,
    ]


def test_a_run_of_nothing_says_what_did_not_run(golden: Run, every_id: list[str]) -> None:
    result = golden("--collect-only")
    lines = result.outlines
    assert f"  {len(every_id)} checks not run" in lines


def test_strict_fails_what_could_not_be_checked(golden: Run) -> None:
    chosen = ("-k", "spm-v1::mask::mistral-common-agrees or spm-v1::tokenizer::file")
    assert golden(*chosen).ret == 0
    result = golden(*chosen, "--mistral-fail-on=note,not-checked")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [
            "not checked: tokenizer v1: this law holds for v2 and later",
            "rerun:  pytest --mistral-golden --mistral-examples 20 --mistral-fail-on=not-checked,note"
            " -k spm-v1::mask::mistral-common-agrees",
        ]
    )
    assert " spm-v1   mask             -        1             -" in _summary(result)


def test_a_run_that_judges_nothing_is_not_green(golden: Run) -> None:
    result = golden("-k", "spm-v1::mask::mistral-common-agrees")
    result.assert_outcomes(skipped=1, deselected=result.parseoutcomes()["deselected"])
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert any(line.startswith("No check could judge") for line in _summary(result))


def test_a_run_whose_checks_are_all_deselected_is_pytest_s_own_affair(golden: Run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_mine="def test_mine(): pass")
    assert golden("-k", "test_mine", ".").ret == 0


def test_strict_by_the_ini_file_does_the_same(golden: Run, pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmistral_fail_on = note,not-checked")
    assert golden("-k", "spm-v1::mask::mistral-common or spm-v1::tokenizer::file").ret == pytest.ExitCode.TESTS_FAILED


def test_strict_changes_nothing_for_what_passes(golden: Run) -> None:
    assert golden("-k", "spm-v1::tokenizer::file", "--mistral-fail-on=note,not-checked").ret == 0


@pytest.mark.parametrize("style", ["auto", "long", "short", "native"])
def test_a_failing_check_prints_no_traceback(style: str, golden: Run, one_of_each: tuple[str, ...]) -> None:
    text = golden(*one_of_each, f"--tb={style}").stdout.str()
    assert text.count("\nML007 ") == 2  # the finding, and its line in the short summary
    assert "Traceback" not in text
    assert "CheckFailedError" not in text
    assert ".py:" not in text


def test_a_packaged_check_fails_by_what_the_target_does(golden: Run, tmp_path: Path) -> None:
    from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer

    file = shipped_tokenizer("spm-v3")
    folder = tmp_path / "model"
    CheckpointTokenizer(file).fast.save_pretrained(folder)
    shutil.copy(file, folder)
    chosen = (f"--mistral-tokenizer={folder}", "-k", "model::template::single or model::tokenizer::text-ids")
    assert golden(*chosen).parseoutcomes()["passed"] == 2
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("[/INST]", " [/INST]"))
    result = golden(*chosen, "-v")
    assert (result.parseoutcomes()["passed"], result.parseoutcomes()["failed"]) == (1, 1)
    result.stdout.fnmatch_lines(
        [
            f"ML004 {template}: *after *",
            "rerun:  *-k model::template::single",
        ]
    )


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, ...], tuple[pytest.RunResult, dict[str, Any]]]:
    """The runs that `report` has made: two workers start two processes, and no test changes what they left."""
    return {}


@pytest.fixture(params=[(), ("-n2",)], ids=["one process", "two workers"])
def report(
    request: pytest.FixtureRequest,
    pytester: pytest.Pytester,
    one_of_each: tuple[str, ...],
    reports: dict[tuple[str, ...], tuple[pytest.RunResult, dict[str, Any]]],
) -> tuple[pytest.RunResult, dict[str, Any]]:
    if request.param in reports:
        return reports[request.param]
    if request.param:
        pytest.importorskip("xdist")
    pytester.makepyfile(test_mine="def test_mine(): pass")
    mine = ("-k", f"{one_of_each[-1]} or test_mine", ".")
    arguments = ("--mistral-golden", "--mistral-report", "x.json", one_of_each[0], *mine, *request.param)
    run = pytester.runpytest_subprocess if request.param else pytester.runpytest_inprocess
    result = run(*arguments)
    reports[request.param] = (result, json.loads((pytester.path / "x.json").read_text(encoding="utf-8")))
    return reports[request.param]


def test_the_report_counts_what_the_terminal_counts(
    report: tuple[pytest.RunResult, dict[str, Any]], every_id: list[str]
) -> None:
    result, data = report
    outcomes = result.parseoutcomes()
    assert data["counts"] == {
        "passed": outcomes["passed"] - 1,  # the user's own test
        "failed": outcomes["failed"],
        "known": 0,
        "not_checked": outcomes["skipped"],
        "deselected": len(every_id) + 4,
        "not_run": 0,
    }
    assert Counter(check["outcome"] for check in data["checks"]) == {"passed": 1, "failed": 1, "skipped": 1}
    assert f"  {data['counts']['deselected']} checks deselected" in _summary(result)


def test_the_report_has_every_check_with_its_findings(report: tuple[pytest.RunResult, dict[str, Any]]) -> None:
    result, data = report
    checks = {check["nodeid"]: check for check in data["checks"]}
    template = "mistral-golden::spm-v1::template::own-new"
    mask = "mistral-golden::spm-v1::mask::mistral-common-agrees"
    file = "mistral-golden::spm-v1::tokenizer::file"
    assert list(checks) == [mask, template, file]
    for nodeid, check in checks.items():
        assert nodeid == "::".join(("mistral-golden", check["target"], check["subject"], check["case"]))
        assert check["seconds"] >= 0
    (finding,) = checks[template]["findings"]
    assert (finding["rule"], finding["severity"]) == ("ML007", "error")
    assert finding["place"].endswith("rows.jsonl:1")
    assert f"{finding['rule']} {finding['place']}: {finding['found']}" in result.outlines
    assert checks[mask]["not_checked"] == "tokenizer v1: this law holds for v2 and later"
    assert checks[file] == {**checks[file], "outcome": "passed", "findings": [], "not_checked": ""}


def test_the_report_says_what_made_it(report: tuple[pytest.RunResult, dict[str, Any]]) -> None:
    result, data = report
    jsonschema.validate(data, SCHEMA)
    assert data["schema_version"] == 1
    assert data["command"].startswith("pytest ")
    assert " --mistral-golden --mistral-report x.json " in data["command"]
    assert data["pytest_mistral_lora"] == __version__
    assert data["exit_status"] == result.ret == 1
    assert data["libraries"] == {name: version(name) for name in ("mistral-common", "transformers", "tokenizers")}
    assert list(data) == [
        "schema_version",
        "pytest_mistral_lora",
        "libraries",
        "known_faults",
        "python",
        "started",
        "seconds",
        "project",
        "command",
        "code",
        "verdict",
        "exit_status",
        "counts",
        "causes",
        "checks",
    ]


def test_the_report_of_a_stopped_run_says_what_did_not_run(golden: Run, own_rows: OwnRows, tmp_path: Path) -> None:
    folder = own_rows()
    write_rows(folder / "rows.jsonl", [ROW, ROW, ROW])
    out = tmp_path / "x.json"
    golden(f"--mistral-golden-dir={folder}", "-k", "spm-v1::template::own-", "-x", f"--mistral-report={out}")
    counts = json.loads(out.read_text())["counts"]
    assert (counts["failed"], counts["not_run"]) == (1, 2)


def test_the_report_can_be_a_page(golden: Run, own_rows: OwnRows, tmp_path: Path) -> None:
    folder = own_rows({**ROW, "name": "new"})
    out = tmp_path / "x.html"
    chosen = ("-k", "spm-v1::template::own- or spm-v1::mask::mistral-common or spm-v1::tokenizer::file")
    assert golden(f"--mistral-golden-dir={folder}", *chosen, f"--mistral-report={out}").ret == 1
    text = out.read_text()
    for words in ("1 failed", "1 passed", "1 not checked", "the row is not recorded", "ML007", "spm-v1 :: mask ::"):
        assert words in text
    # the commands that repeat the check, and that record the golden
    assert "-k spm-v1::template::own-new</pre>" in text
    assert "--mistral-golden-update</pre>" in text
