from __future__ import annotations

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from github_markdown import rendered
from judged_samples import HOSTILE, causes_of, judged, write_file

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.environment import faults
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.programs.facts import fact
from pytest_mistral_lora.report.github import add_job_summary, annotation_lines
from pytest_mistral_lora.report.judged import FilePlace, Judged, JudgedCase, file_place


@pytest.fixture(autouse=True)
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_WORKSPACE", raising=False)
    return tmp_path


def test_an_annotation_is_beside_its_line(workspace: Path) -> None:
    file = write_file(workspace)
    for name in ("rows.jsonl", file):
        place = Place.of(name, record=3).within("messages", 1, "role")
        [line] = annotation_lines(causes_of(Finding("ML601", "'bot'", place, "a role")))
        assert line.startswith("::error file=rows.jsonl,line=3,title=ML601 ")
        assert (
            f"::{name}:3, messages[1].role: 'bot'%0Acheck: spm-v3::dataset::case-0%0Aexpected: a role%0Afix: " in line
        )


def test_a_note_is_a_notice_and_a_place_that_is_no_file_is_in_the_message() -> None:
    [line] = annotation_lines(causes_of(Finding("ML617", "x", Place.of("http://127.0.0.1:8080"))))
    assert line.startswith("::notice title=ML617 ")
    assert "::http://127.0.0.1:8080: x%0A" in line


def test_files_are_named_from_the_workspace(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = workspace / "data"
    data.mkdir()
    write_file(data, "a, b.jsonl")
    monkeypatch.chdir(data)
    monkeypatch.setenv("GITHUB_WORKSPACE", str(workspace))
    place = file_place(Place.of("a, b.jsonl", record=2).within("messages", 0, "content"))
    assert place is not None
    assert (place.file.as_posix(), place.line) == ("data/a, b.jsonl", 2)
    outside = file_place(Place.of(workspace.parent))
    assert outside is not None
    assert outside.file == workspace.parent
    assert file_place(NOWHERE) is None
    assert file_place(Place.of("gone.jsonl", record=3)) is None
    # no file has so many lines, and a log with such a line would be refused
    assert file_place(Place.of("a, b.jsonl", record=int("9" * 4000))) == FilePlace(Path("data/a, b.jsonl"))


def test_hostile_text_makes_no_workflow_command(workspace: Path) -> None:
    write_file(workspace, "a,b:c%.jsonl")
    lines = annotation_lines(
        causes_of(Finding("ML601", HOSTILE, Place.of("a,b:c%.jsonl", record=1), HOSTILE, row=HOSTILE))
    )
    [line] = "\n".join(lines).splitlines()
    properties, _, message = line.removeprefix("::error ").partition("::")
    # as the runner reads them: the properties end at the first `::`, and a comma ends a property
    assert [part.partition("=")[0] for part in properties.split(",")] == ["file", "line", "title"]
    assert unquote(properties.split(",")[0]) == "file=a,b:c%.jsonl"
    assert unquote(message).startswith("a,b:c%.jsonl:1: a, b: 100% of\\r\n::add-mask::x\n##[error]y\\u2028::error::z")
    line.encode()  # the lone surrogate, too, can be printed


def test_the_summary_of_a_job_is_added_to_its_file(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    add_job_summary(judged(Finding("ML601", "'bot'", Place.of("rows.jsonl", record=3))))
    assert list(workspace.iterdir()) == []
    summary = workspace / "summary.md"
    summary.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    add_job_summary(judged(Finding("ML601", HOSTILE, Place.of("rows.jsonl", record=3)), Finding("ML617", "x")))
    text = summary.read_text()
    assert text.startswith("before\n## mistral\\-lora check\n\n`1 finding`\n")
    assert "| `mistral-golden.spm-v3.train` | - | - | 1 |" in text
    assert "### ❌ ML601: " in text
    assert "### 📝 ML617: " in text
    # the text stands in a fence that is longer than any in it: nothing of it is mark-up
    fences = re.findall(r"^(`{3,})(?:text)?$", text, flags=re.MULTILINE)
    assert [len(fence) for fence in fences] == [8, 8, 3, 3]
    found = rendered(text)
    assert found.faults() == []
    assert any("<script>" in code for code in found.code)


@pytest.mark.parametrize(
    "text", ["@bob", "www.evil.test", "`" * 300 + "\n" + "`" * 280 + "\n@bob #1 <img src=x>", "a|b @bob"]
)
def test_no_text_of_a_row_or_a_name_is_obeyed_in_the_summary(
    text: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(workspace / "summary.md"))
    finding = Finding("ML601", text, Place.of(text), text, row=text)
    case, [cause] = JudgedCase(text, "failed"), causes_of(finding)
    add_job_summary(Judged("mistral-lora check", [{**cause, "check": text}], [case], text, known=[text]))
    found = rendered((workspace / "summary.md").read_text())
    assert found.faults() == []
    assert found.tags.count("td") == 4


def test_a_summary_that_cannot_be_written_takes_no_verdict(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(workspace / "gone" / "summary.md"))
    add_job_summary(judged(Finding("ML601", "'bot'", Place.of("rows.jsonl", record=3))))
    assert "GITHUB_STEP_SUMMARY cannot be written" in capsys.readouterr().err


def test_a_summary_has_room_for_so_many_causes(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(workspace / "summary.md"))
    long = [Finding("ML601", "x" * 400_000, shape=str(number)) for number in range(4)]
    add_job_summary(judged(*long))
    text = (workspace / "summary.md").read_text()
    assert len(text) < 1_000_000
    assert "… and 2 more causes" in text


def test_a_summary_has_room_for_so_many_bytes_beside_those_of_earlier_commands(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = workspace / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    for _ in range(2):
        add_job_summary(judged(*[Finding("ML601", "漢" * 100_000, shape=str(number)) for number in range(4)]))
        assert summary.stat().st_size < 1_000_000


@pytest.mark.of_field
@pytest.mark.parametrize("version", ["5.23.0", "5.24.0"])
def test_a_known_fault_of_the_libraries_is_in_the_summary_of_the_job_and_in_the_reports(
    version: str, workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = workspace / "summary.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setattr(faults, "facts", lambda: (fact("merges-by-id").model_copy(update={"rules": ("ML601",)}),))
    monkeypatch.setattr(faults, "installed_versions", lambda: {"transformers": version})
    (workspace / "rows.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    reports = [f"--report={workspace / name}" for name in ("x.json", "x.html")]
    rows = str(workspace / "rows.jsonl")
    assert main(["check", rows, "--tokenizer", "spm-v3", "--output-format", "github", *reports]) == 1
    is_affected = version == "5.23.0"
    assert ("\nknown of transformers 5.23.0 (ML601): " in capsys.readouterr().out) is is_affected
    assert ("\n`known of transformers 5.23.0 " in summary.read_text()) is is_affected
    known = json.loads((workspace / "x.json").read_text())["known_faults"]
    assert [line[:37] for line in known] == ["known of transformers 5.23.0 (ML601):"] * is_affected
    assert ("<dd>known of transformers 5.23.0 (ML601): " in (workspace / "x.html").read_text()) is is_affected


def test_a_title_says_the_fault_and_a_message_that_is_too_long_is_cut() -> None:
    [line] = annotation_lines(causes_of(Finding("ML546", "the EOS of turn 1", Place.of("x"), shape="a → b")))
    assert "title=ML546 EOS of an answer is masked::" in line
    [cause] = causes_of(Finding("ML601", "x" * 5000, Place.of("y")))
    [line] = annotation_lines([cause])
    assert len(line.rpartition("::")[2].replace("%0A", "\n").replace("%25", "%")) == 4000
