"""`report-false-alarm`: one file about a finding, which somebody else can judge again."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pytest_mistral_lora import audit
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.conformance.finding import RULES

RunVerb = Callable[..., subprocess.CompletedProcess[str]]
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
TURNS = [{"role": "user", "content": "Where is Paris?"}, {"role": "assistant", "content": "In France."}]
SPELLS = [TURNS[0], {"role": "assistant", "content": f"Write [INST] before it, \x1b[31m by {SECRET}."}]
ROWS = [
    {"messages": TURNS},
    {"messages": SPELLS},
    {"messages": [{"role": "bot", "content": "Wien"}]},
    {"messages": SPELLS},
]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def alarm(folder: Path, rule: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / f"false-alarm-{rule}.json").read_text())
    return loaded


@pytest.fixture
def folder(tmp_path: Path, mistral_lora: RunVerb) -> Path:
    """A folder with rows and the report of their check."""
    (tmp_path / "of-alice").mkdir()
    write_rows(tmp_path / "of-alice" / "train.jsonl", ROWS)
    words = ("check", "of-alice/train.jsonl", "--tokenizer", "spm-v3", "--report", "report.json")
    assert mistral_lora(*words, folder=tmp_path).returncode == 1
    return tmp_path


@pytest.fixture
def encoded_folder(tmp_path: Path, mistral_lora: RunVerb) -> Path:
    """A folder with an encoded row whose EOS is masked, and its report."""
    encoded = Oracle(shipped_tokenizer("spm-v3")).encode({"messages": TURNS})
    row = {"messages": TURNS, "input_ids": [*encoded.input_ids], "labels": [*encoded.labels[:-1], -100]}
    write_rows(tmp_path / "encoded.jsonl", [row])
    words = ("audit", "encoded.jsonl", "--tokenizer", "spm-v3", "--report", "report.json")
    assert mistral_lora(*words, folder=tmp_path).returncode == 1
    return tmp_path


def test_the_file_has_the_row_the_rule_the_versions_and_the_command(folder: Path, mistral_lora: RunVerb) -> None:
    done = mistral_lora("report-false-alarm", "ml601", "--from", "report.json", folder=folder)
    assert done.returncode == 0, done.stderr
    assert "still has ML601" in done.stdout
    found = alarm(folder, "ML601")
    assert found["row"] == ROWS[2]
    assert (found["finding"]["place"], found["finding"]["found"]) == (
        "of-alice/train.jsonl:3, messages[0].role",
        "'bot'",
    )
    rule = RULES["ML601"]
    assert {key: found["rule"][key] for key in ("id", "severity", "since")} == {
        "id": rule.id,
        "severity": rule.severity,
        "since": rule.since,
    }
    assert found["versions"]["of_the_run"].keys() | {"system"} == found["versions"]["here"].keys()
    assert found["command"].startswith("mistral-lora check of-alice/train.jsonl --tokenizer spm-v3")
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    assert found["tokenizer"] == {
        "name": "spm-v3",
        "file": oracle.path.name,
        "version": "v3",
        "sha256": oracle.sha256,
    }
    assert found["judged_again"]["finds"] is True


def test_a_finding_is_named_as_it_is_printed(folder: Path, mistral_lora: RunVerb) -> None:
    # the two rows that spell [INST] are of one cause, and each is a finding
    done = mistral_lora("report-false-alarm", "ML612", "--from", "report.json", folder=folder)
    assert done.returncode == 2
    assert all(f"of-alice/train.jsonl:{line}: the text spells [INST]" in done.stderr for line in (2, 4))
    for words in (["ML612 of-alice/train.jsonl:4"], ["ML612", "of-alice/train.jsonl:4:", "the text spells [INST]"]):
        assert mistral_lora("report-false-alarm", *words, "--from", "report.json", folder=folder).returncode == 0
        assert alarm(folder, "ML612")["finding"]["place"] == "of-alice/train.jsonl:4"
    done = mistral_lora("report-false-alarm", "ML612", "of-alice/train.jsonl:3", "--from", "report.json", folder=folder)
    assert (done.returncode, "of-alice/train.jsonl:2" in done.stderr) == (2, True)
    done = mistral_lora("report-false-alarm", "ML602", "--from", "report.json", folder=folder)
    assert done.returncode == 2
    assert "did you mean" in done.stderr


def test_no_secret_is_written_and_no_terminal_obeys_the_file(
    folder: Path, mistral_lora: RunVerb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_TOKEN", "Write [INST] before")
    monkeypatch.setenv("HARMLESS", "a-value-of-the-environment")
    words = ("ML612", "of-alice/train.jsonl:2", "--from", "report.json", "--output", "alarm.json")
    assert mistral_lora("report-false-alarm", *words, folder=folder).returncode == 0
    text = (folder / "alarm.json").read_text()
    assert SECRET not in text
    assert "Write [INST]" not in text
    assert "a-value-of-the-environment" not in text
    assert "\x1b" not in text
    assert "\x1b" in json.loads(text)["row"]["messages"][1]["content"]


def test_a_scrubbed_row_has_the_finding_and_no_text_or_folder(folder: Path, mistral_lora: RunVerb) -> None:
    words = ("ML612", "of-alice/train.jsonl:2", "--from", "report.json", "--scrub")
    done = mistral_lora("report-false-alarm", *words, folder=folder)
    assert "the scrubbed row alone still has ML612" in done.stdout
    text = (folder / "false-alarm-ML612.json").read_text()
    assert [word for word in ("alice", "Paris", "Write", "before", str(folder)) if word in text] == []
    content = alarm(folder, "ML612")["row"]["messages"][1]["content"]
    assert content.startswith("Xxxxx [INST] xxxxxx xx, \x1b[00x xx xx_")


def test_a_scrubbed_row_of_another_format_has_the_finding(tmp_path: Path, mistral_lora: RunVerb) -> None:
    talk = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Before [INST], in Bergen."}]
    (tmp_path / "talks.json").write_text(json.dumps([{"conversations": talk}]))
    words = ("check", "talks.json", "--tokenizer", "spm-v3", "--report", "report.json")
    assert mistral_lora(*words, folder=tmp_path).returncode == 0
    done = mistral_lora("report-false-alarm", "ML612", "--from", "report.json", "--scrub", folder=tmp_path)
    assert "the scrubbed row alone still has ML612" in done.stdout
    assert "Bergen" not in (tmp_path / "false-alarm-ML612.json").read_text()


def test_scrubbed_ids_have_the_finding(encoded_folder: Path, mistral_lora: RunVerb) -> None:
    words = ("ML546", "--from", "report.json", "--scrub")
    done = mistral_lora("report-false-alarm", *words, folder=encoded_folder)
    assert "the scrubbed row alone still has ML546" in done.stdout
    found = alarm(encoded_folder, "ML546")
    assert found["row"]["labels"][-1] == -100
    decoded = Oracle(shipped_tokenizer("spm-v3")).decode(found["row"]["input_ids"])
    assert decoded.split() == ["Xxxxx", "xx", "Xxxxx?", "Xx", "Xxxxxx."]
    assert "Paris" not in (encoded_folder / "false-alarm-ML546.json").read_text()
    # the fault is in the file as it is sent
    assert "ML546" in {finding.rule for finding in audit([found["row"]], tokenizer="spm-v3").findings}


def test_a_row_is_judged_again_by_the_objective_of_its_run(tmp_path: Path, mistral_lora: RunVerb) -> None:
    talk = [*SPELLS[:1], {"role": "assistant", "content": "a"}, SPELLS[0], {"role": "assistant", "content": "b"}]
    encoded = Oracle(shipped_tokenizer("spm-v3")).encode({"messages": talk})
    row = {"messages": talk, "input_ids": [*encoded.input_ids], "labels": [*encoded.labels]}
    write_rows(tmp_path / "encoded.jsonl", [row])
    words = ("audit", "encoded.jsonl", "--tokenizer", "spm-v3", "--objective", "last-answer")
    assert mistral_lora(*words, "--report", "report.json", folder=tmp_path).returncode == 1
    done = mistral_lora("report-false-alarm", "ML549", "--from", "report.json", folder=tmp_path)
    assert "the row alone still has ML549" in done.stdout
    assert "--objective last-answer" in alarm(tmp_path, "ML549")["judged_again"]["command"]


def test_ids_that_spell_a_secret_are_left_out(tmp_path: Path, mistral_lora: RunVerb) -> None:
    encoded = Oracle(shipped_tokenizer("spm-v3")).encode({"messages": SPELLS})
    row = {"input_ids": [*encoded.input_ids], "labels": [*encoded.labels[:-1], -100]}
    write_rows(tmp_path / "encoded.jsonl", [row])
    mistral_lora("audit", "encoded.jsonl", "--tokenizer", "spm-v3", "--report", "report.json", folder=tmp_path)
    words = ("report-false-alarm", "ML546", "--from", "report.json")
    assert mistral_lora(*words, folder=tmp_path).returncode == 0
    found = alarm(tmp_path, "ML546")
    assert (found["row"], "--scrub" in found["row_left_out"]) == (None, True)
    assert "still has ML546" in mistral_lora(*words, "--scrub", folder=tmp_path).stdout
    ids = alarm(tmp_path, "ML546")["row"]["input_ids"]
    assert SECRET not in Oracle(shipped_tokenizer("spm-v3")).decode(ids)


def test_a_finding_that_needs_other_rows_is_said_not_to_be_there(tmp_path: Path, mistral_lora: RunVerb) -> None:
    write_rows(tmp_path / "train.jsonl", [{"messages": TURNS}, {"messages": TURNS}])
    words = ("check", "train.jsonl", "--tokenizer", "spm-v3", "--report", "report.json")
    mistral_lora(*words, folder=tmp_path)
    report = json.loads((tmp_path / "report.json").read_text())
    [repeats] = {cause["rule"] for cause in report["causes"] if "dataset" in cause["check"]}
    done = mistral_lora("report-false-alarm", repeats, "--from", "report.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert alarm(tmp_path, repeats)["judged_again"]["finds"] is not True


def test_rows_in_memory_and_an_unknown_tokenizer_are_said_to_be_unknown(tmp_path: Path, mistral_lora: RunVerb) -> None:
    encoded = Oracle(shipped_tokenizer("spm-v3")).encode({"messages": TURNS})
    row = {"messages": TURNS, "input_ids": [*encoded.input_ids], "labels": [*encoded.labels[:-1], -100]}
    audit([row], tokenizer="spm-v3").write(tmp_path / "report.json")
    done = mistral_lora("report-false-alarm", "ML546", "rows[0]", "--from", "report.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = alarm(tmp_path, "ML546")
    assert "--tokenizer" in found["tokenizer"]["not_known"]
    assert (found["row"], "--tokenizer" in found["row_left_out"]) == (None, True)
    assert found["judged_again"]["finds"] is None


def test_a_finding_about_a_folder_has_no_row(tmp_path: Path, mistral_lora: RunVerb) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    save_file({"a": np.zeros(3, np.float32)}, tmp_path / "adapter" / "adapter_model.safetensors")
    mistral_lora("check", "adapter", "--report", "report.json", folder=tmp_path)
    # four findings have one place: the printed line tells them apart
    done = mistral_lora("report-false-alarm", "ML408", "--from", "report.json", folder=tmp_path)
    assert (done.returncode, "adapter_config.json: r is missing" in done.stderr) == (2, True)
    line = "ML408 adapter/adapter_config.json: r is missing"
    done = mistral_lora("report-false-alarm", *line.split(), "--from", "report.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = alarm(tmp_path, "ML408")
    assert found["finding"]["found"].startswith("r is missing")
    assert (found["row"], found["row_left_out"]) == (None, "the finding is not about a row")


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON"])
def test_what_is_no_report_is_bad_input(text: str, folder: Path, mistral_lora: RunVerb) -> None:
    (folder / "other.json").write_text(text)
    done = mistral_lora("report-false-alarm", "ML612", "--from", "other.json", folder=folder)
    assert done.returncode == 2
    assert "other.json" in done.stderr


def test_a_file_of_somebody_else_is_kept(folder: Path, mistral_lora: RunVerb) -> None:
    (folder / "false-alarm-ML601.json").write_text('{"mine": 1}')
    done = mistral_lora("report-false-alarm", "ML601", "--from", "report.json", folder=folder)
    assert done.returncode == 2
    assert (folder / "false-alarm-ML601.json").read_text() == '{"mine": 1}'
    with pytest.raises(SystemExit, match="2"):
        mistral_lora("report-false-alarm", "ML601", "--from", "report.json", "--output", "report.json", folder=folder)


def test_an_explained_rule_and_the_form_for_a_wrong_verdict_name_the_verb(
    mistral_lora: RunVerb, tmp_path: Path
) -> None:
    last = mistral_lora("rules", "ML601", folder=tmp_path).stdout.splitlines()[-1]
    assert "mistral-lora report-false-alarm ML601 " in last
    form = Path(__file__).parents[1] / ".github" / "ISSUE_TEMPLATE" / "wrong_verdict.yml"
    text = form.read_text(encoding="utf-8")
    assert "mistral-lora report-false-alarm" in text
    assert "name: A wrong verdict\n" in text
