"""`mistral-lora check`: rows, tokenizers and what is no target."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from check_verb import check, rows

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.checks import Check
from pytest_mistral_lora.conformance.collection import targets_of
from pytest_mistral_lora.conformance.finding import Result
from pytest_mistral_lora.conformance.path_kinds import recognised
from pytest_mistral_lora.conformance.targets import DatasetTarget, Target


def test_findings_are_written_for_other_machines(capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    monkeypatch.setenv("GITHUB_WORKSPACE", str(tmp_path))
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    rows(tmp_path, "bot")
    bad = (str(tmp_path / "rows.jsonl"), "--tokenizer", "spm-v3")
    code, out = check(capsys, *bad, "--output-format", "github")
    assert code == 1
    [line] = [line for line in out.splitlines() if line.startswith("::error ")]
    assert line.startswith("::error file=rows.jsonl,line=3,title=ML601 ")
    assert "/rows.jsonl:3, messages[1].role: 'bot'%0Acheck: rows.jsonl::dataset::rows-are-valid%0A" in line
    assert summary.read_text().count("### ❌ ML601") == 1


def test_known_deviations_do_not_fail_and_a_list_has_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows(tmp_path, "bot")
    known = tmp_path / "known.txt"
    words = (str(tmp_path / "rows.jsonl"), "--tokenizer", "spm-v3")
    assert check(capsys, *words, "--write-xfails", str(known))[0] == 1
    assert main(["check", *words, "--write-xfails", str(known)]) == 2
    assert f"--write-xfails: {known} exists" in capsys.readouterr().err
    assert main(["check", *words, "--xfails", str(known)]) == 2
    node_id = "mistral-golden::rows.jsonl::dataset::rows-are-valid"
    assert f"{known}:" in (error := capsys.readouterr().err)
    assert f"'{node_id}' has no reason" in error
    reasons = known.read_text().replace("  # \n", "  # a bot is an assistant\n")
    known.write_text(f"{reasons}ML305  # of the tiny train\n")
    code, out = check(capsys, *words, "--xfails", str(known), "--json")
    data = json.loads(out)
    assert (code, data["counts"]["known"], data["counts"]["failed"], data["causes"]) == (0, 1, 0, [])
    known.write_text(known.read_text() + "ML602  # mended long ago\n")
    assert main(["check", *words, "--xfails", str(known)]) == 1
    assert f"{known}:7: ML602 matches no finding" in capsys.readouterr().err


def test_no_path_is_the_embedded_default_of_the_plugin(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, pytester: pytest.Pytester
) -> None:
    collected = pytester.runpytest_inprocess("--mistral-golden", "--collect-only", "-q").outlines
    capsys.readouterr()
    monkeypatch.setattr(Check, "run", lambda check: Result())  # which checks are run, not what they find
    for options, expected in (
        ([], [line for line in collected if "::" in line]),
        (["--no-train"], [line for line in collected if "::" in line and "::train::" not in line]),
    ):
        code, out = check(capsys, *options, "--json")
        assert code == 0
        assert sorted(one["nodeid"] for one in json.loads(out)["checks"]) == sorted(expected) != []


def test_a_base_without_an_adapter_is_bad_usage(capsys: Any) -> None:
    assert main(["check", "--base", "models/base"]) == 2
    assert "--base" in capsys.readouterr().err
    assert main(["check", "spm-v3", "--base", "models/base"]) == 2
    assert "spm-v3 is a tokenizer" in capsys.readouterr().err


def test_what_is_not_there_is_bad_usage(capsys: Any) -> None:
    assert main(["check", "nope"]) == 2
    assert capsys.readouterr().err == "error: nope: no such file or folder\n"


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    rows(tmp_path, "assistant")
    return tmp_path / "rows.jsonl"


def test_rows_are_judged_by_a_tokenizer_alone(healthy: Path, capsys: Any) -> None:
    code, out = check(capsys, str(healthy), "--tokenizer", "spm-v3", "-v")
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == f"{healthy}: rows (JSON Lines, `messages` with role/content)"
    assert {line.split()[1] for line in lines if line.startswith(" rows.jsonl ")} == {"dataset"}
    assert [line.partition(",")[0] for line in lines if line.startswith("oracle of ")] == [
        "oracle of rows.jsonl: spm-v3 (v3)"
    ]
    # the table of figures, and little else
    assert lines.index("figures of rows.jsonl:") < 10
    assert len(lines) < 24


_REMEDY = ": mistral-lora check --dataset ROWS"


@pytest.mark.parametrize("files", [2, 3, 6])
def test_a_green_check_of_several_files_with_signs_is_ten_lines(files: int, tmp_path: Path, capsys: Any) -> None:
    said = ("Hi", ("None", "nan", "As an AI, I cannot help with that.", "None"))
    row = [{"messages": [{"role": "user", "content": said[0]}, {"role": "assistant", "content": a}]} for a in said[1]]
    paths = [tmp_path / f"rows-{number}.jsonl" for number in range(files)]
    for path in paths:
        path.write_text("".join(f"{json.dumps(one)}\n" for one in row))
    words = ["check", *map(str, paths), "--tokenizer", "spm-v3", "--no-cache"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 10
    [title] = [at for at, line in enumerate(lines) if line.startswith("look at these (")]
    shown = re.fullmatch(r"look at these \((\d+) of (\d+), -v lists all\):", lines[title])
    assert shown is not None
    assert [line.startswith("  ML6") for line in lines[title + 1 :]].count(True) == int(shown[1])
    # every check that passed is counted in a line of targets
    passed = sum(int(number) for line in lines for number in re.findall(r": (\d+) passed", line))
    [verdict] = [line for line in lines if " checks passed, 0 failed" in line]
    assert f"; {passed} checks passed" in verdict
    assert main([*words, "-v"]) == 0
    whole = capsys.readouterr().out.splitlines()
    assert [f"{path}: rows (JSON Lines, `messages` with role/content)" for path in paths] == whole[:files]
    at = whole.index("look at these:")
    assert sum(line.startswith("  ML6") for line in whole[at:]) == int(shown[2])


def test_a_green_check_is_ten_lines_and_says_how_much_was_not_checked(tmp_path: Path, capsys: Any) -> None:
    rows(tmp_path, "assistant")
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    encoded = row | {"input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [-100] * 4 + [23325, 2]}
    (tmp_path / "encoded.jsonl").write_text(json.dumps(encoded))
    files = (str(tmp_path / name) for name in ("rows.jsonl", "encoded.jsonl"))
    words = ("check", *files, "--tokenizer", "spm-v3", "--no-cache")
    assert main([*words]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 10
    [unchecked] = [line for line in out.splitlines() if line.startswith("not checked: ")]
    number = re.search(r", 0 failed, (\d+) not checked$", out, re.MULTILINE)
    assert number is not None
    assert unchecked.startswith(f"not checked: {number[1]} check: ")
    assert unchecked.endswith(_REMEDY)
    assert re.search(r"^figures of rows.jsonl: \d+ rows?, ", out, re.MULTILINE)
    assert main([*words, "--verbose"]) == 0
    whole = capsys.readouterr().out
    lines = whole.splitlines()
    assert {"not checked:", "figures of rows.jsonl:"} <= set(lines)
    assert any(line.startswith("  encoded.jsonl: ") and line.endswith(f"{_REMEDY} (1)") for line in lines)
    assert whole.splitlines()[-1] == out.splitlines()[-1]
    # a fault is shown with everything
    rows(tmp_path, "bot")
    assert main([*words]) == 1
    assert "not checked:" in capsys.readouterr().out.splitlines()


def test_a_bad_row_of_a_dataset_is_named_and_fails(healthy: Path, capsys: Any) -> None:
    rows(healthy.parent, "bot")
    code, out = check(capsys, str(healthy), "--tokenizer", str(shipped_tokenizer("spm-v3")))
    assert code == 1
    assert "rows.jsonl::dataset::rows-are-valid FAILED" in out.splitlines()
    assert f"ML601 {healthy}:3, messages[1].role: 'bot'" in out


def test_rows_beside_a_tokenizer_are_judged_by_it_and_it_is_judged_too(healthy: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(shipped_tokenizer("spm-v3"), tmp_path / "tokenizer.model.v3"))
    targets = targets_of([recognised(path) for path in (healthy, file)])
    assert [(type(target), target.name) for target in targets] == [
        (Target, "tokenizer.model.v3"),
        (DatasetTarget, "rows.jsonl"),
    ]
    assert targets[1].tokenizer is targets[0].tokenizer


def test_rows_without_a_tokenizer_are_bad_usage_with_the_command(healthy: Path, capsys: Any) -> None:
    assert main(["check", str(healthy)]) == 2
    err = capsys.readouterr().err
    assert err.endswith(f": mistral-lora check {healthy} --tokenizer spm-v3\n")
    for name, hint in (("spm-v9", " (did you mean 'spm-v7'?)"), (str(healthy.parent / "nope"), "")):
        assert main(["check", str(healthy), "--tokenizer", name]) == 2
        err = capsys.readouterr().err
        assert [value for value in (f"{name}: no such file or folder{hint}; ", "spm-v1") if value not in err] == []
    assert main(["check", "spm-v3", "--tokenizer", "spm-v3"]) == 2
    assert "--tokenizer is for rows" in capsys.readouterr().err


def test_encoded_rows_are_judged_by_check_too(healthy: Path, capsys: Any) -> None:
    assert main(["render", str(healthy), "--tokenizer", "spm-v3", "--json"]) == 0
    encoded = healthy.with_name("encoded.jsonl")
    encoded.write_text(capsys.readouterr().out)
    code, out = check(capsys, str(encoded), "--tokenizer", "spm-v3", "-v")
    assert code == 0
    assert out.startswith(f"{encoded}: encoded rows (JSON Lines with input_ids)\n")
    encoded.write_text(encoded.read_text().replace(", 2]", ", 3]", 1))
    assert check(capsys, str(encoded), "--tokenizer", "spm-v3")[0] == 1


def test_json_has_the_kind_of_each_path(healthy: Path, capsys: Any) -> None:
    code, out = check(capsys, str(healthy), "--tokenizer", "spm-v3", "--json")
    title = "rows (JSON Lines, `messages` with role/content)"
    assert (code, json.loads(out)["paths"]) == (0, [{"path": str(healthy), "kind": "rows", "title": title}])


def test_a_kind_can_be_declared(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "odd").write_text("1\n")
    assert main(["check", str(tmp_path / "odd")]) == 2
    assert "--as recipe|rows|encoded|adapter|gguf|tokenizer" in capsys.readouterr().err
    code, out = check(capsys, str(tmp_path / "odd"), "--as", "rows", "--tokenizer", "spm-v3")
    assert code == 1
    assert out.startswith(f"{tmp_path / 'odd'}: rows, as --as declares\n")


def test_a_card_shows_its_row_and_each_target_has_one_command_to_repeat_it(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "</s> and [INST]"}]
    faulty = [{"messages": turns}, {"messages": [*turns, {"role": "user", "content": "More?"}]}]
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in faulty))
    words = ["check", "a.jsonl", "b.jsonl", "--tokenizer", "spm-v3", "--report", "x.json", "--report=x.html"]
    main(words)
    capsys.readouterr()
    commands = [cause["commands"]["rerun"] for cause in json.loads(Path("x.json").read_text())["causes"]]
    repeated = {f"mistral-lora check {name} --tokenizer spm-v3" for name in ("a.jsonl", "b.jsonl")}
    assert set(commands) <= repeated
    page = Path("x.html").read_text()
    assert page.count("Repeat it:") == len(set(commands))
    assert "<summary>The row</summary>" not in page
    assert page.count("The row:") == sum(
        bool(cause["row"]) for cause in json.loads(Path("x.json").read_text())["causes"]
    )
    assert page.count("The row:") >= 1
