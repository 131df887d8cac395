from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from converted import converted_tokenizer

from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.cli import main

FILE = shipped_tokenizer("spm-v3")
Audit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    oracle = Oracle(FILE)
    result = []
    for number in range(8):
        question = {"role": "user", "content": f"Is it {number}?"}
        row = {"messages": [question, {"role": "assistant", "content": f"It is {number}."}]}
        encoded = oracle.encode(row)
        ids, labels = list(encoded.input_ids), list(encoded.labels or ())
        result.append({"row": number, **row, "input_ids": ids, "labels": labels})
    return result


@pytest.fixture
def audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Audit:
    def audit(lines: list[Any], *arguments: str) -> tuple[int, str, str]:
        path = _write(tmp_path / "rows.jsonl", lines)
        code = main(["check", str(path), "--tokenizer", str(FILE), *arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return audit


def _write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _all_trained(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**line, "labels": line["input_ids"]} for line in lines]


def test_a_sound_file_is_fine(lines: list[dict[str, Any]], audit: Audit) -> None:
    tokens = sum(len(line["input_ids"]) for line in lines)
    trained = sum(label != -100 for line in lines for label in line["labels"])
    code, out, err = audit(lines)
    verdict, figures, found = out.splitlines()
    assert (code, err, found) == (0, "", "0 findings")
    assert verdict == "8 rows: 8 sound, 0 wrong, 0 not judged"
    assert figures.startswith(f"{trained} of {tokens} tokens ")


def test_every_finding_is_counted_and_one_of_each_cause_is_shown(
    lines: list[dict[str, Any]], audit: Audit, tmp_path: Path
) -> None:
    long = {**lines[0], "messages": [*lines[0]["messages"], *lines[1]["messages"]]}
    encoded = Oracle(FILE).encode({"messages": long["messages"]})
    long |= {"input_ids": list(encoded.input_ids)}
    code, out, err = audit(_all_trained([long, *lines[1:]]))
    assert (code, err) == (1, "")
    path = tmp_path / "rows.jsonl"
    # the first row has more messages than the others
    assert [line for line in out.splitlines() if line.endswith("wrong: everything-trained")] == [
        "wrong: everything-trained"
    ]
    assert next(line for line in out.splitlines() if line.startswith("ML543 ")).startswith(f"ML543 {path}:2: ")
    assert f"and 7 more like it: {path}:1, 3-8" in " ".join(out.split())
    assert out.count("\nML543 ") == 2  # the finding and the line of the table
    assert out.splitlines()[-6].split() == ["rule", "class", "found", "causes"]
    assert out.splitlines()[-5].split() == ["ML543", "everything-trained", "8", "1"]
    assert out.splitlines()[-2:] == ["8 findings of 1 cause", "next: mistral-lora rules ML543"]


def test_the_causes_of_a_class_that_are_shown_can_be_bounded(lines: list[dict[str, Any]], audit: Audit) -> None:
    broken = [{**line, "labels": list(line["labels"])} for line in lines[:3]]
    for line, index in zip(broken, (0, 1, 3), strict=True):
        line["labels"][index] = line["input_ids"][index]  # <s>, [INST], [/INST]
    _, out, _ = audit(broken, "--show", "2")
    assert out.splitlines()[-5].split() == ["ML547", "prompt-trained", "3", "3", "2", "shown"]
    assert out.splitlines()[-2] == "3 findings of 3 causes"


def test_json_has_an_object_for_each_finding_and_a_summary(lines: list[dict[str, Any]], audit: Audit) -> None:
    code, out, err = audit(_all_trained(lines[:3]), "--output-format=jsonl")
    assert (code, err) == (1, "")
    *findings, last = [json.loads(line) for line in out.splitlines()]
    assert [(f["rule"], f["class"], f["severity"], f["index"], f["state"]) for f in findings] == [
        ("ML543", "everything-trained", "error", index, "wrong") for index in range(3)
    ]
    assert {"place", "found", "expected", "detail", "row"} <= findings[0].keys()
    summary = last["summary"]
    assert (summary["rows"], summary["sound"], summary["wrong"], summary["not_judged"]) == (3, 0, 3, 0)
    assert summary["tokens"] == summary["supervised_tokens"]
    assert summary["classes"] == [{"rule": "ML543", "class": "everything-trained", "count": 3}]


def test_findings_are_written_for_other_machines(
    lines: list[dict[str, Any]], audit: Audit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = [*lines[:2], *_all_trained(lines[2:4])]
    code, out, _ = audit(broken, "--output-format", "github")
    annotation, verdict = out.splitlines()
    assert code == 1
    assert annotation.startswith("::error file=rows.jsonl,line=3,title=ML543 ")
    assert verdict.startswith("4 rows: 2 sound, 2 wrong, ")
    assert verdict.endswith("; 2 findings of 1 cause")


def test_checks_that_had_nothing_to_judge_are_not_passed(lines: list[dict[str, Any]], audit: Audit) -> None:
    nameless = [{key: value for key, value in line.items() if key != "row"} for line in lines]
    code, out, _ = audit(nameless)
    assert code == 0
    [line] = [line for line in out.splitlines() if line.startswith("not checked: rows-complete: ")]
    assert line.endswith(": mistral-lora check --dataset ROWS")
    assert "not checked" not in audit(lines)[1]

    def skipped(lines: list[Any]) -> set[str]:
        return {*json.loads(audit(lines, "--output-format=jsonl")[1].splitlines()[-1])["summary"]["not_checked"]}

    assert skipped(lines) == set()
    assert skipped(nameless) == {"rows-complete"}
    # mistral-common refuses an answer without a question: no id and no label of the file is judged
    refused = [{**lines[0], "messages": lines[0]["messages"][1:]}]
    assert skipped(refused) >= {"labels", "packing"}
    summary = json.loads(audit(refused, "--output-format=jsonl")[1].splitlines()[-1])["summary"]
    assert summary["not_checked"]["ids"] == "no row of the file can be judged"


def test_the_dataset_says_what_is_missing(lines: list[dict[str, Any]], audit: Audit, tmp_path: Path) -> None:
    dataset = _write(tmp_path / "dataset.jsonl", [{"messages": line["messages"]} for line in lines])
    assert audit(lines, "--dataset", str(dataset))[0] == 0
    code, out, _ = audit(lines[:6], "--dataset", str(dataset))
    assert code == 1
    assert "2 of 8 rows are not there: 6, 7" in out


@pytest.mark.parametrize("form", [[], ["--output-format=jsonl"]])
def test_lines_that_cannot_be_read_are_findings(form: list[str], lines: list[dict[str, Any]], audit: Audit) -> None:
    code, out, err = audit([lines[0], "{", *lines[2:]], *form)
    assert (code, err) == (1, "")
    assert "ML501" in out
    assert "rows.jsonl:2" in out


def test_what_is_no_file_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert main(["check", str(path), "--tokenizer", str(FILE)]) == 2
        assert str(path) in capsys.readouterr().err


def test_a_bar_is_drawn_on_a_terminal_and_only_on_stderr(
    lines: list[dict[str, Any]], audit: Audit, tmp_path: Path
) -> None:
    path = _write(tmp_path / "rows.jsonl", lines)
    command = [sys.executable, "-m", "pytest_mistral_lora.cli", "check", str(path), "--tokenizer", str(FILE)]
    terminal, side = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=side, text=True, env=environment, check=True)
    os.close(side)
    drawn = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert result.stdout.splitlines()[0] == "8 rows: 8 sound, 0 wrong, 0 not judged"
    assert "rows" in drawn
    _, _, quiet = audit(lines)
    assert quiet == ""


def test_a_folder_without_mistrals_own_file_is_audited_by_the_tokenizer_that_it_was_made_from(
    lines: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "saved"
    converted_tokenizer("spm-v3").fast.save_pretrained(folder)
    words = ["check", str(_write(tmp_path / "rows.jsonl", lines)), "--tokenizer", str(folder)]
    assert main(words) == 0
    assert main([*words, "--oracle", "spm-v3"]) == 0
    capsys.readouterr()
    assert main([*words, "--oracle", "none"]) == 2
    assert re.search(r"no Mistral tokenizer file, .*oracle .*none", capsys.readouterr().err)
    assert main([*words, "--oracle", "spm-v2"]) == 2
    assert "not spm-v2: 32,744 of 32,768 ids" in capsys.readouterr().err
