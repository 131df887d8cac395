from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from plugin_rows import ROW, write_rows

from pytest_mistral_lora.conformance.finding import RULES

Run = Callable[..., pytest.RunResult]
OwnRows = Callable[..., Path]
NAMED = {**ROW, "name": "prime"}
OTHER = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}], "name": "prime"}
UNPINNED = "base: {repo: a/b}\ndata: {train: [goldens/rows.jsonl]}\ntraining: {steps: 1}\noutput: out\n"
CHOSEN = "spm-v3::template::own-"


def _judge(golden: Run, folder: Path, *args: str) -> pytest.RunResult:
    return golden(f"--mistral-golden-dir={folder}", "-k", CHOSEN, *args)


def _record(golden: Run, folder: Path) -> pytest.RunResult:
    return _judge(golden, folder, "--mistral-golden-update")


def _golden(folder: Path, name: str = "prime") -> Path:
    return folder / "templates" / "spm-v3" / f"{name}.json"


def _outcomes(result: pytest.RunResult) -> dict[str, int]:
    return {name: count for name, count in result.parseoutcomes().items() if name != "deselected"}


def _report(result: pytest.RunResult) -> list[str]:
    """Lines of the failure, from its rule id to the line before the summary."""
    lines = result.outlines
    start = next(n for n, line in enumerate(lines) if line.startswith("ML"))
    end = next(n for n, line in enumerate(lines) if " Mistral conformance " in line)
    return lines[start:end]


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


@pytest.fixture
def recorded(golden: Run, own_rows: OwnRows) -> Path:
    folder = own_rows(NAMED)
    assert _outcomes(_record(golden, folder)) == {"passed": 1}
    return folder


def _rule_lines(rule_id: str) -> list[str]:
    rule = RULES[rule_id]
    return [f"  rule:     {rule.title}", f"  why:      {rule.why}", f"  fix:      {rule.fix}"]


def test_a_row_that_is_not_recorded_fails_and_says_how_to_record_it(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows(NAMED)
    result = _judge(golden, folder)
    assert _outcomes(result) == {"failed": 1}
    assert _report(result) == [
        f"ML007 {folder}/rows.jsonl:1: the row is not recorded",
        f"  expected: a golden {_golden(folder)}",
        *_rule_lines("ML007"),
        "",
        f"rerun:  pytest --mistral-golden --mistral-golden-dir={folder.name} -k spm-v3::template::own-prime",
        f"update: pytest --mistral-golden --mistral-golden-dir={folder.name} --mistral-golden-update",
    ]
    assert not (folder / "templates").exists()


def test_a_base_without_a_pin_is_the_one_cause_of_rows_that_are_not_recorded(
    golden: Run, own_rows: OwnRows, pytester: pytest.Pytester
) -> None:
    own_rows(ROW)
    (pytester.path / "recipe.yaml").write_text(UNPINNED)
    options = ("--mistral-recipe=recipe.yaml", "--mistral-golden-dir=goldens", "--mistral-report=out.json")
    assert golden(*options).ret == 1
    report = json.loads((pytester.path / "out.json").read_text())
    assert [(one["rule"], one["count"]) for one in report["causes"]] == [("ML640", 1)]
    [row] = [one for one in report["checks"] if one["case"] == "own-rows-1"]
    assert (row["outcome"], row["not_checked"].endswith("failed (ML640)")) == ("skipped", True)


def test_recording_lists_each_file_and_leaves_the_same_one_as_it_is(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows(NAMED, ROW)
    first = _record(golden, folder)
    assert [line for line in first.outlines if line.startswith("golden ")] == [
        f"golden created: {_golden(folder)}",
        f"golden created: {_golden(folder, 'rows-2')}",
    ]
    assert "goldens: 2 created, 0 rewritten, 0 unchanged" in first.outlines
    assert _outcomes(first) == _outcomes(_judge(golden, folder)) == {"passed": 2}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "templates").rglob("*.json")}
    assert len(before) == 2
    second = _record(golden, folder)
    assert [line for line in second.outlines if line.startswith("golden ")] == [
        f"golden unchanged: {_golden(folder)}",
        f"golden unchanged: {_golden(folder, 'rows-2')}",
    ]
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before}


def test_a_changed_row_fails_until_it_is_recorded_again(golden: Run, recorded: Path) -> None:
    write_rows(recorded / "rows.jsonl", [OTHER])
    result = _judge(golden, recorded)
    assert _outcomes(result) == {"failed": 1}
    assert _report(result)[0].startswith(f"ML007 {recorded}/rows.jsonl:1: the row ")
    _record(golden, recorded).stdout.fnmatch_lines([f"golden rewritten: {_golden(recorded)}"])
    assert _outcomes(_judge(golden, recorded)) == {"passed": 1}


def test_a_golden_without_its_row_file_is_still_judged(golden: Run, recorded: Path) -> None:
    (recorded / "rows.jsonl").unlink()
    assert _outcomes(_judge(golden, recorded)) == {"passed": 1}


def test_a_check_chosen_by_k_is_the_only_one_recorded(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows(NAMED, {**OTHER, "name": "hello"})
    golden(f"--mistral-golden-dir={folder}", "-k", "spm-v3::template::own-hello", "--mistral-golden-update")
    assert [path.name for path in (folder / "templates").rglob("*.json")] == ["hello.json"]


def test_recording_without_a_folder_is_refused(golden: Run) -> None:
    result = golden("--mistral-golden-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    [error] = result.stderr.str().splitlines()
    assert error.startswith("ERROR: --mistral-golden-update: ")
    assert [value for value in ("--mistral-golden-dir PATH", "rows.jsonl") if value not in error] == []


def test_recording_is_refused_where_ci_is_set(golden: Run, own_rows: OwnRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    result = _record(golden, own_rows(NAMED))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert result.stderr.str().strip().startswith("ERROR: --mistral-golden-update is refused if CI is set")


@pytest.mark.parametrize("workers", [("-n", "2"), ("-n2",), ("--numprocesses=1",), ("--tx", "2*popen", "--dist=load")])
def test_recording_is_refused_with_workers(workers: tuple[str, ...], golden: Run, own_rows: OwnRows) -> None:
    pytest.importorskip("xdist")
    folder = own_rows(NAMED)
    result = _judge(golden, folder, "--mistral-golden-update", *workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    error = result.stderr.str().strip()
    assert error.startswith("ERROR: --mistral-golden-update ")
    assert error.endswith("leave out -n")
    assert not (folder / "templates").exists()


def test_recording_with_no_worker_is_fine(golden: Run, own_rows: OwnRows) -> None:
    pytest.importorskip("xdist")
    assert _outcomes(_judge(golden, own_rows(NAMED), "--mistral-golden-update", "-n0")) == {"passed": 1}


def test_a_moved_token_is_shown_with_its_neighbours_and_the_versions(golden: Run, recorded: Path) -> None:
    def older(data: dict[str, Any]) -> None:
        data["input_ids"][6] = 29571
        data["recorded_with"] = {"mistral-common": "1.11.0", "transformers": "4.99.0", "tokenizers": "0.1"}

    _edit(_golden(recorded), older)
    result = _judge(golden, recorded)
    assert _outcomes(result) == {"failed": 1}
    running = ", ".join(f"{name} {version(name)}" for name in ("mistral-common", "transformers", "tokenizers"))
    command = f"pytest --mistral-golden --mistral-golden-dir={recorded.name}"
    line, *shown = _report(result)
    assert line.startswith(f"ML002 {_golden(recorded)}: ")
    assert line.endswith("text → [/INST]")
    assert shown == [
        "  12 tokens expected, 12 found; the first difference is at token 6",
        "    token  expected        label  token  found           label",
        "        1  3 [INST]        -100       1  3 [INST]        -100",
        "        2  7388 '␣Name'    -100       2  7388 '␣Name'    -100",
        "        3  1032 '␣a'       -100       3  1032 '␣a'       -100",
        "        4  8907 '␣prime'   -100       4  8907 '␣prime'   -100",
        "        5  29491 '.'       -100       5  29491 '.'       -100",
        "  >     6  29571 'м'       -100       6  4 [/INST]       -100",
        "        7  22051 '␣Seven'  train      7  22051 '␣Seven'  train",
        "        8  1117 '␣is'      train      8  1117 '␣is'      train",
        "        9  8907 '␣prime'   train      9  8907 '␣prime'   train",
        "       10  29491 '.'       train     10  29491 '.'       train",
        "       11  2 </s>          train     11  2 </s>          train",
        "  recorded: mistral-common 1.11.0, transformers 4.99.0, tokenizers 0.1",
        f"  running:  {running}",
        f"  row:      {json.dumps(ROW)}",
        *_rule_lines("ML002"),
        "",
        f"rerun:  {command} -k spm-v3::template::own-prime",
        f"update: {command} --mistral-golden-update",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        pytest.param("[]", "$: []; expected object", marks=pytest.mark.slow),
        pytest.param("\udcff", "byte 0xff", marks=pytest.mark.slow),
    ],
)
def test_a_file_that_is_no_golden_fails_by_name(text: str, message: str, golden: Run, recorded: Path) -> None:
    _golden(recorded).write_text(text, encoding="utf-8", errors="surrogateescape")
    result = _judge(golden, recorded)
    assert _outcomes(result) == {"failed": 1}
    assert _report(result)[0].startswith(f"ML001 {_golden(recorded)}: ")
    assert message in _report(result)[0]


def _without_spans(data: dict[str, Any]) -> None:
    del data["spans"]


def _extra_key(data: dict[str, Any]) -> None:
    data["note"] = "mine"


def _other_case(data: dict[str, Any]) -> None:
    data["case"] = "other"


def _user_label(data: dict[str, Any]) -> None:
    data["labels"][3] = data["input_ids"][3]


def _bad_row(data: dict[str, Any]) -> None:
    data["row"]["messages"][0]["role"] = "bot"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_spans, r"\$\.spans: is missing"),
        pytest.param(_extra_key, r'\$\.note: "mine"', marks=pytest.mark.slow),
        pytest.param(_other_case, r"\$\.case: 'other', .*prime\.json", marks=pytest.mark.slow),
        (_user_label, r"\$\.labels: .* token 3"),
        pytest.param(_bad_row, r"\$\.row: messages\[0\]\.role: 'bot'", marks=pytest.mark.slow),
    ],
)
def test_a_golden_that_breaks_its_form_names_the_violation(
    change: Callable[[dict[str, Any]], None], message: str, golden: Run, recorded: Path
) -> None:
    _edit(_golden(recorded), change)
    result = _judge(golden, recorded)
    assert _outcomes(result) == {"failed": 1}
    assert _report(result)[0].startswith(f"ML001 {_golden(recorded)}: ")
    assert re.search(message, _report(result)[0])


def test_a_supervised_token_that_the_assistant_did_not_say_is_no_golden(golden: Run, recorded: Path) -> None:
    def other_answer(data: dict[str, Any]) -> None:
        at = next(n for n, label in enumerate(data["labels"]) if label != -100)
        data["input_ids"][at] = data["labels"][at] = 5846

    _edit(_golden(recorded), other_answer)
    result = _judge(golden, recorded)
    assert _report(result)[0].startswith(f"ML001 {_golden(recorded)}: turn 1 decodes to ")


def test_other_spans_fail_by_their_own_rule(golden: Run, recorded: Path) -> None:
    def as_text(data: dict[str, Any]) -> None:
        data["spans"][1]["kind"] = "text"

    _edit(_golden(recorded), as_text)
    assert _report(_judge(golden, recorded))[0].startswith(f"ML003 {_golden(recorded)}: labels or spans ")


@pytest.mark.parametrize("update", [(), ("--mistral-golden-update",)])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ('{"messages": []}', "messages"),
        (json.dumps({**ROW, "name": "../up"}), "case name '../up'"),
        (json.dumps({**ROW, "name": ["a"]}), "case name \"['a']\""),
    ],
)
def test_a_row_that_cannot_be_used_fails_at_its_line(
    line: str, message: str, update: tuple[str, ...], golden: Run, own_rows: OwnRows
) -> None:
    folder = own_rows()
    (folder / "rows.jsonl").write_text(f"\n{line}\n")
    result = _judge(golden, folder, *update)
    assert _outcomes(result) == {"failed": 1}
    first = _report(result)[0]
    assert first.startswith(f"ML007 {folder}/rows.jsonl:2")
    assert message in first
    assert not (folder / "templates").exists()


def test_a_row_that_mistral_refuses_fails_when_it_is_recorded(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows({"messages": [ROW["messages"][1]] * 2 + [ROW["messages"][0]], "name": "ends-with-user"})
    result = _record(golden, folder)
    assert _outcomes(result) == {"failed": 1}
    assert _report(result)[0].startswith(f"ML007 {folder}/rows.jsonl:1")


def test_a_name_that_is_used_twice_fails_beside_the_first(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows(NAMED, OTHER)
    result = _record(golden, folder)
    assert _outcomes(result) == {"failed": 1}
    line = _report(result)[0]
    assert line.startswith(f"ML007 {folder}/rows.jsonl:2: ")
    assert "'prime'" in line
    assert line.endswith(f" {folder}/rows.jsonl:1")


def test_two_folders_may_use_the_same_name(golden: Run, own_rows: OwnRows) -> None:
    first, second = own_rows(NAMED, folder="a"), own_rows(OTHER, folder="b")
    both = (f"--mistral-golden-dir={second}", "-v")
    _judge(golden, first, *both, "--mistral-golden-update").stdout.fnmatch_lines(
        [f"golden created: {_golden(first)}", f"golden created: {_golden(second)}"]
    )
    result = _judge(golden, first, *both)
    assert _outcomes(result) == {"passed": 2}
    result.stdout.fnmatch_lines(["*::template::own-prime PASSED*", "*::template::own-prime-2 PASSED*"])


def test_a_row_file_of_any_name_gives_names_that_k_can_choose(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows()
    (folder / "rows.jsonl").rename(folder / "_my rows (1).jsonl")
    write_rows(folder / "_my rows (1).jsonl", [ROW])
    assert _outcomes(_record(golden, folder)) == {"passed": 1}
    assert _golden(folder, "my-rows-1--1").is_file()


def test_a_row_file_that_cannot_be_opened_is_a_finding_beside_the_others(golden: Run, own_rows: OwnRows) -> None:
    folder = own_rows(NAMED)
    (folder / "more.jsonl").mkdir()
    result = _judge(golden, folder)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        [f"ML007 {folder}/more.jsonl: cannot be read: Is a directory", f"ML007 {folder}/rows.jsonl:1: the row is not*"]
    )
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*pytest_mistral_lora/*")
