"""`mistral-lora check --runner`: exit codes, what is printed, what is kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import hostile_runners as hostile
import pytest

from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.cli import main

Audit = Callable[..., tuple[int, str, str]]

EXACT = """\
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
oracle = Oracle(shipped_tokenizer("spm-v3"))
for line, row in zip(lines, rows):
    encoded = oracle.encode(row)
    line.update(input_ids=list(encoded.input_ids), labels=list(encoded.labels))
"""


@pytest.fixture
def audit(tmp_path: Path, checkpoint: Path, rows: list[Row], capsys: pytest.CaptureFixture[str]) -> Audit:
    (tmp_path / "rows.jsonl").write_text("".join(row.to_jsonl() + "\n" for row in rows))

    def audit(body: str, *options: str) -> tuple[int, str, str]:
        words = ["--runner", str(hostile.script(tmp_path, body)), "--tokenizer", str(checkpoint)]
        code = main(["check", *words, "--dataset", str(tmp_path / "rows.jsonl"), *options])
        output = capsys.readouterr()
        return code, output.out, output.err

    return audit


def test_a_sound_runner_is_fine_and_its_versions_are_said(audit: Audit) -> None:
    code, out, err = audit(EXACT + hostile.SOUND)
    assert (code, out.splitlines()[0]) == (0, "4 rows: 4 sound, 0 wrong, 0 not judged")
    assert err == "mine 1.0; no configuration\n"


def test_a_row_that_is_dropped_is_a_finding(audit: Audit, tmp_path: Path) -> None:
    code, out, _ = audit(EXACT + hostile.DROPS, "--output", str(tmp_path / "kept.jsonl"))
    assert code == 1
    assert f"ML502 {tmp_path}/rows.jsonl:2: row 1 was dropped" in out
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == 4


def test_a_finding_names_the_row_that_the_runner_was_given(audit: Audit, tmp_path: Path) -> None:
    code, out, _ = audit(EXACT + "    line['labels'][-1] = -100\n" + hostile.SOUND, "--output-format=jsonl")
    assert code == 1
    *findings, _ = [json.loads(line) for line in out.splitlines()]
    of_rows = [one for one in findings if one["rule"] == "ML546"]
    assert [one["place"] for one in of_rows] == [f"{tmp_path}/rows.jsonl:{line}" for line in range(1, 5)]
    assert "mistral-audit-" not in out


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param(
            hostile.HANGS.replace("given.config", "given.output"),
            "look at what it waits for; it printed last:",
            marks=pytest.mark.slow,
        ),
        (hostile.CRASHES, "exit code 7: ValueError: no such template"),
        (hostile.GARBAGE["no JSON"], "not valid JSON"),
        (hostile.GARBAGE["no file"], "wrote no file"),
    ],
    ids=["hangs", "crashes", "garbage", "silent"],
)
def test_a_runner_without_rows_is_bad_input(body: str, words: str, audit: Audit) -> None:
    code, out, err = audit(body, "--time-limit", "2")
    assert (code, out) == (2, "")
    assert words in err
    assert "Traceback" not in err


def test_a_configuration_that_is_not_there_is_bad_input(audit: Audit, tmp_path: Path) -> None:
    for path, words in ((tmp_path / "nope.yaml", "nope.yaml: no such file"), (tmp_path, "a folder; expected a conf")):
        code, _, err = audit(hostile.SOUND, "--config", str(path))
        assert code == 2
        assert words in err


def test_without_a_dataset_the_packaged_rows_are_encoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body = EXACT + hostile.SOUND
    assert (
        main(
            ["check", "--runner", str(hostile.script(tmp_path, body)), "--tokenizer", "spm-v3", "--output-format=jsonl"]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["summary"]["sound"] == 41


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rows.jsonl", "--runner", "trl"], "both PATH and --runner are given"),
        (["--runner", "nope"], "'nope' is not a runner"),
    ],
)
def test_one_thing_is_judged(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *words, "--tokenizer", str(shipped_tokenizer("spm-v3"))]) == 2
    assert message in capsys.readouterr().err


def test_a_python_without_the_runner_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--runner", "axolotl", "--tokenizer", "spm-v3", "--python", sys.executable]) == 2
    assert f"{sys.executable}: Axolotl is not installed in this Python" in capsys.readouterr().err


def test_a_runner_that_is_not_set_up_is_named_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(tmp_path))
    assert main(["check", "--runner", "axolotl", "--tokenizer", "spm-v3"]) == 2
    assert "Make it: mistral-lora runner setup axolotl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("ms-swift", "external_plugins: [evil.py]"),
        ("axolotl", "datasets: [{path: x, type: evil.load}]"),
        ("lm-eval", "include_path: tasks"),
    ],
)
def test_a_configuration_that_names_code_is_refused_before_anything_runs(
    name: str, line: str, tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "theirs.yaml"
    config.write_text(f"# theirs\n{line}\n")
    words = ["check", "--runner", name, "--config", str(config), "--tokenizer", str(checkpoint)]
    # a Python without the trainer: nothing is run with --allow-code either
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    words += ["--python", str(python)]
    assert main(words) == 2
    refused = capsys.readouterr().err
    assert f"{config}:2, {line.partition(':')[0]}" in refused
    assert "--allow-code" in refused
    assert main([*words, "--allow-code"]) == 2
    assert "is not installed in this Python" in capsys.readouterr().err


def test_code_is_allowed_to_a_runner_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").touch()
    assert main(["check", str(tmp_path / "rows.jsonl"), "--tokenizer", "spm-v3", "--allow-code"]) == 2
    assert "--allow-code is for the rows of --runner" in capsys.readouterr().err


def test_a_script_may_be_of_any_trainer(audit: Audit) -> None:
    code, out, _ = audit(EXACT + "    line['labels'] = line['input_ids']\n" + hostile.SOUND)
    assert code == 1
    assert out.count("\n  Axolotl:  Set `train_on_inputs: false`") == 1
