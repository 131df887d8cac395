from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from sampling import sampled

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.environment import installed_versions
from pytest_mistral_lora.programs.facts import fact

Run = Callable[..., pytest.RunResult]

ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
NODE = "mistral-golden::encoded.jsonl::encoded"


@pytest.fixture
def known(pytester: pytest.Pytester) -> Callable[[str], Path]:
    """Write a file of known deviations, beside a tokenizer and an encoded-rows file whose ids are not its own."""
    shutil.copy(shipped_tokenizer("spm-v3"), pytester.path / "tok.model.v3")
    broken = {**ROW, "row": 0, "input_ids": [1, 3, 1032, 4, 1055, 2, 2], "labels": [-100] * 4 + [1055, 2, 2]}
    (pytester.path / "encoded.jsonl").write_text(json.dumps(broken) + "\n")

    def write(text: str) -> Path:
        path = pytester.path / "known.txt"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def judged(golden: Run) -> Run:
    def run(*args: str) -> pytest.RunResult:
        return golden("--mistral-tokenizer=tok.model.v3", "--mistral-encoded=encoded.jsonl", "-k", "encoded", *args)

    return run


def _broken(result: pytest.RunResult) -> set[str]:
    """Return the rules whose findings are shown."""
    return {line[:5] for line in result.outlines if line[:2] == "ML" and line[2:5].isdigit()}


def test_findings_of_a_known_rule_do_not_fail(known: Callable[[str], Path], judged: Run) -> None:
    known("")
    rules = _broken(judged())
    assert rules
    known("# looked at together\n\n" + "".join(f"{rule}  # the trainer appends two ends\n" for rule in rules))
    result = judged("--mistral-xfails=known.txt")
    assert result.ret == 0
    outcomes = result.parseoutcomes()
    assert outcomes["xfailed"]
    assert "failed" not in outcomes
    assert any(line.startswith(f"known {min(rules)}: the trainer appends two ends (") for line in result.outlines)


def test_findings_of_another_rule_still_fail(known: Callable[[str], Path], judged: Run) -> None:
    known("ML204  # has nothing to do with it\n")
    result = judged("--mistral-xfails=known.txt")
    assert result.ret == 1
    assert _broken(result)


def test_a_node_id_covers_its_check_alone(known: Callable[[str], Path], judged: Run) -> None:
    known("")
    failed = [line.split()[0] for line in judged("-v").outlines if line.startswith(NODE) and " FAILED" in line]
    known(f"{failed[0]} # known since March\n")
    outcomes = judged("--mistral-xfails=known.txt").parseoutcomes()
    assert outcomes["xfailed"] == 1
    assert outcomes.get("failed", 0) == len(failed) - 1


def test_runxfail_shows_what_is_known(known: Callable[[str], Path], judged: Run) -> None:
    known("")
    rules = _broken(judged())
    known("".join(f"{rule}  # known\n" for rule in rules))
    assert _broken(judged("--mistral-xfails=known.txt", "--runxfail")) == rules


def test_known_deviations_are_in_the_report(
    known: Callable[[str], Path], judged: Run, pytester: pytest.Pytester
) -> None:
    known("")
    rules = sorted(_broken(judged()))
    known("".join(f"{rule}  # known\n" for rule in rules))
    judged("--mistral-xfails=known.txt", "--mistral-report=out.json")
    checks = json.loads((pytester.path / "out.json").read_text())["checks"]
    seen = [check for check in checks if check["known"]]
    assert {check["outcome"] for check in seen} == {"known"}
    assert sorted({one["id"] for check in seen for one in check["known"]}) == rules
    assert all(check["findings"] == [] for check in seen)


def test_one_that_every_finder_missed_fails(
    known: Callable[[str], Path], golden: Run, pytester: pytest.Pytester
) -> None:
    known("ML608  # mended long ago\n")
    (pytester.path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    rows = ("--mistral-tokenizer=spm-v3", "--mistral-dataset=rows.jsonl")
    for words in ((*rows, "--mistral-xfails=known.txt"), (*rows, "-o", "mistral_xfails=known.txt")):
        result = golden(*words)
        assert result.ret == 1
        assert any(line.startswith("known.txt:1: ML608 matches no finding") for line in result.outlines)


@pytest.mark.parametrize(("chosen", "code"), [("no-duplicates", 1), ("rows-are-valid", 0)])
def test_one_is_out_of_date_if_the_check_of_its_rule_ran_alone(
    chosen: str, code: int, known: Callable[[str], Path], golden: Run, pytester: pytest.Pytester
) -> None:
    known("ML608  # mended long ago\n")
    (pytester.path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    rows = ("--mistral-tokenizer=spm-v3", "--mistral-dataset=rows.jsonl")
    result = golden(*rows, "--mistral-xfails=known.txt", "-k", chosen)
    assert result.ret == code
    assert any("ML608 matches no finding" in line for line in result.outlines) is bool(code)


def test_one_of_targets_that_the_command_line_replaces_is_not_met(
    known: Callable[[str], Path], golden: Run, pytester: pytest.Pytester
) -> None:
    known("ML608  # of the rows in the ini file\n")
    for name in ("rows.jsonl", "others.jsonl"):
        (pytester.path / name).write_text(json.dumps(ROW) + "\n")
    ini = ("-o", "mistral_datasets=others.jsonl", "-o", "mistral_xfails=known.txt")
    result = golden("--mistral-tokenizer=spm-v3", "--mistral-dataset=rows.jsonl", *ini)
    assert result.ret == 0
    result.stdout.fnmatch_lines(["  not met: ML608 (known.txt:1): *"])


SOUND = ("--mistral-tokenizer=spm-v3", "--mistral-dataset=rows.jsonl")
FRONTS = {
    "check": ("check", "rows.jsonl", "--tokenizer", "spm-v3", "--xfails", "known.txt"),
    "ini": (*SOUND, "-o", "mistral_xfails=known.txt"),
    "option": (*SOUND, "--mistral-xfails=known.txt"),
}


@pytest.mark.parametrize("train", [True, False], ids=["train", "no train"])
@pytest.mark.parametrize("front", FRONTS)
def test_one_of_checks_that_are_not_in_the_run_is_not_met_on_every_front(
    front: str,
    train: bool,
    known: Callable[[str], Path],
    golden: Run,
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    known("ML204  # our collator masks by position, not by the pad id\n")
    (pytester.path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    monkeypatch.chdir(pytester.path)
    start = "not met: ML204 (known.txt:1): "
    if front == "check":
        assert main([*FRONTS[front], "--train" if train else "--no-train"]) == 0
        assert any(line.startswith(start) for line in capsys.readouterr().out.splitlines())
    else:
        result = golden(*FRONTS[front], *([] if train else ["--mistral-no-train"]))
        assert result.ret == 0
        assert any(line.startswith(f"  {start}") for line in result.outlines)


def test_from_its_date_on_one_accepts_nothing(known: Callable[[str], Path], judged: Run) -> None:
    known("")
    rules = _broken(judged())
    known("".join(f"{rule}  # the trainer appends two ends  # until 2099-12-31\n" for rule in rules))
    assert judged("--mistral-xfails=known.txt").ret == 0
    known("".join(f"{rule}  # the trainer appends two ends  # until 2020-01-31\n" for rule in rules))
    result = judged("--mistral-xfails=known.txt")
    assert result.ret == 1
    assert _broken(result) == rules
    result.stdout.fnmatch_lines(["  *until 2020-01-31 (known.txt:1): the trainer appends two ends"])
    assert not any("matches no finding" in line for line in result.outlines)


def test_one_that_matches_nothing_is_fine_where_only_some_checks_ran(known: Callable[[str], Path], golden: Run) -> None:
    known("ML001  # of another check\n")
    result = golden("--mistral-tokenizer=tok.model.v3", "--mistral-xfails=known.txt", "-k", "tokenizer::file")
    assert result.ret == 0


@pytest.mark.parametrize(
    ("text", "line", "values"),
    [
        ("ML204\n", 1, ("'ML204' has no reason", "ML204  # ")),
        (
            "\nML999 # x\n",
            2,
            ("no rule, cause or known fault 'ML999'", "ML204", "default-system-prompt", "merges-by-id"),
        ),
        (
            "mistral-golden::spm-v3::tokeniser::file # x\n",
            1,
            (
                "'mistral-golden::spm-v3::tokeniser::file'",
                "(did you mean 'tokenizer'?)",
                "mistral-golden::TARGET::SUBJECT::CHECK",
            ),
        ),
        ("ML204 # x\nML204 # y\n", 2, ("ML204 is listed twice", "known.txt:1")),
        ("ML204 # x # until June\n", 1, ("'until June' is not a date", "until 2027-06-30")),
    ],
)
def test_a_bad_line_is_a_usage_error(
    text: str, line: int, values: tuple[str, ...], known: Callable[[str], Path], golden: Run
) -> None:
    known(text)
    result = golden("--mistral-xfails=known.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    error = result.stderr.str().strip()
    assert error.startswith(f"ERROR: --mistral-xfails: known.txt:{line}: ")
    assert [value for value in values if value not in error] == []


def test_the_list_that_a_run_writes_accepts_it_once_it_has_reasons(
    known: Callable[[str], Path], judged: Run, golden: Run, pytester: pytest.Pytester
) -> None:
    known("")
    result = judged("--mistral-write-xfails=found.txt")
    assert result.ret == 1
    listed = pytester.path / "found.txt"
    text = listed.read_text()
    entries = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert entries
    assert all(entry.endswith("  # ") for entry in entries)
    # each entry has its findings above it, and none of them has a reason yet
    assert all(f"# {rule}" in text for rule in _broken(judged()))
    refused = judged("--mistral-xfails=found.txt")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    name = entries[0].removesuffix("  # ")
    assert f"found.txt:5: '{name}' has no reason; expected: {name}  # why" in refused.stderr.str()
    listed.write_text(text.replace("  # \n", "  # looked at\n"))
    assert judged("--mistral-xfails=found.txt").ret == 0
    assert golden("--mistral-write-xfails=found.txt").ret == pytest.ExitCode.USAGE_ERROR


@pytest.mark.slow
def test_the_first_process_knows_what_the_workers_did_not_run(
    known: Callable[[str], Path], golden: Run, pytester: pytest.Pytester
) -> None:
    known("ML608  # mended long ago\nML204  # of no check in this run\n")
    (pytester.path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    result = golden(*SOUND, "--mistral-xfails=known.txt", "-n", "2")
    assert result.ret == 1
    assert any(line.startswith("known.txt:1: ML608 matches no finding") for line in result.outlines)
    assert any(line.startswith("  not met: ML204 (known.txt:2): ") for line in result.outlines)
    assert golden(*SOUND, "--mistral-xfails=known.txt", "-n", "2", "-k", "statistics").ret == 0


@pytest.mark.slow
def test_known_deviations_work_with_workers(known: Callable[[str], Path], judged: Run) -> None:
    known("")
    rules = _broken(judged())
    known("".join(f"{rule}  # known\n" for rule in rules))
    result = judged("--mistral-xfails=known.txt", "-n", "2")
    assert result.ret == 0
    assert result.parseoutcomes()["xfailed"]


@pytest.mark.of_field
@pytest.mark.parametrize("processes", sampled(["0", "2"], ["0"]))
def test_a_known_fault_that_the_versions_do_not_have_is_remarked_and_fails_nothing(
    processes: str, known: Callable[[str], Path], golden: Run
) -> None:
    known("served-letters-as-markers  # ours\nmerges-by-id  # of an older environment\n")
    standing = fact("merges-by-id").standing(installed_versions())
    lines = {
        "absent": "not met: merges-by-id (known.txt:2): the versions of this run do not have the fault",
        "present": "not met: merges-by-id (known.txt:2): a check that can find it did not run",
        "ended": f"merges-by-id (known.txt:2): {standing.remark}; it is still accepted: remove it",
    }
    chosen = ("-n", processes, "-k", "tokenizer::file")
    result = golden("--mistral-tokenizer=tok.model.v3", "--mistral-xfails=known.txt", *chosen)
    assert result.ret == 0
    assert f"  {lines[standing.state]}" in result.outlines
    not_met = "not met: served-letters-as-markers (known.txt:1): a check that can find it did not run"
    assert f"  {not_met}" in result.outlines
