"""The files of `--report` for other programs: one run writes them all, and no file of somebody else is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judged_samples import HOSTILE, judged

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.report.judged import VERDICT_FORMATS, verdict_format, write_verdict


@pytest.mark.parametrize("end", VERDICT_FORMATS)
@pytest.mark.parametrize("found", [True, False], ids=["red", "green"])
def test_a_verdict_replaces_a_verdict_and_no_other_file(
    end: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"verdict{end}"
    made_as = verdict_format(path)
    assert made_as is not None
    write_verdict(
        path, made_as, judged(*([Finding("ML601", HOSTILE, Place.of("rows.jsonl", record=3))] if found else []))
    )
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    command = ["check", "rows.jsonl", "--tokenizer", "spm-v3", "--report", path.name]
    assert main(command) == 0
    for text in ("mine", '[{"description": "of another tool"}]', '{"version": "2.1.0"}', "<testsuites></testsuites>"):
        path.write_text(text)
        with pytest.raises(SystemExit, match="2"):
            main(command)
        assert "was not written by this command" in capsys.readouterr().err
        assert path.read_text() == text


def test_one_run_writes_every_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "bot", "content": "Hi"}]}\n')
    names = ["report.json", "report.html", *(f"verdict{end}" for end in VERDICT_FORMATS)]
    command = ["check", "rows.jsonl", "--tokenizer", "spm-v3"]
    assert main([*command, *(word for name in names for word in ("--report", name))]) == 1
    assert [name for name in names if "ML601" not in (tmp_path / name).read_text()] == []
    for output_format, end in (("sarif", ".sarif"), ("junit", ".xml")):
        capsys.readouterr()
        assert main([*command, "--output-format", output_format]) == 1
        printed, written = capsys.readouterr().out, (tmp_path / f"verdict{end}").read_text()
        if output_format == "sarif":
            assert json.loads(printed) == json.loads(written)
        else:
            assert printed.count("<testcase") == written.count("<testcase")
