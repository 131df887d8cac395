from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_runs import write_rows

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.records.notes import with_author_section
from pytest_mistral_lora.training.run import RunResult


def test_a_line_a_fact_and_why_one_is_not_available(
    adapter: Path, run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    assert main(["verify", str(adapter), "-v"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "not available  dataset_sha256: no dataset given" in lines
    assert "match          seal" in lines
    sources = ("--base", str(run.base_folder), "--dataset", str(rows))
    assert main(["verify", str(adapter), *sources, "--verbose"]) == 0
    *facts, verdict, following = capsys.readouterr().out.splitlines()
    assert following == f"next: mistral-lora smoke {adapter}"
    assert {line.split("  ")[0] for line in facts} == {"match"}
    assert len({*facts}) == len(facts)
    assert verdict == f"no difference: {len(facts)} match, 0 mismatch, 0 not available"


def test_by_default_matches_are_counted_and_values_share_a_line_by_their_reason(
    adapter: Path, run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(adapter)]) == 0
    *lines, verdict, _ = capsys.readouterr().out.splitlines()
    assert {line.split("  ")[0] for line in lines} == {"not available"}
    reasons = [line.rpartition(": ")[2] for line in lines]
    assert "no dataset given" in reasons
    assert len({*reasons}) == len(reasons)
    assert verdict.startswith("no difference: ")
    sources = ("--base", str(run.base_folder), "--dataset", str(write_rows(tmp_path / "rows.jsonl")))
    assert main(["verify", str(adapter), *sources]) == 0
    assert capsys.readouterr().out.splitlines()[0].startswith("no difference: ")


def test_a_mismatch_ends_with_1_and_shows_both(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / "later.txt").write_text("later")
    assert main(["verify", str(adapter), "--json"]) == 1
    [fact] = [fact for fact in json.loads(capsys.readouterr().out) if fact["state"] == "mismatch"]
    assert (fact["name"], fact["recorded"], fact["found"]) == ("files.later.txt", None, "is not listed")
    assert main(["verify", str(adapter)]) == 1
    *facts, verdict, following = capsys.readouterr().out.splitlines()
    assert following.startswith("next: mistral-lora ")
    assert "mismatch       files.later.txt: is not listed" in facts
    assert verdict.startswith("a difference: ")
    assert ", 1 mismatch, " in verdict


def test_values_are_written_for_other_machines(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapter.parent)
    (adapter / "later.txt").write_text("later")
    assert main(["verify", "copy", "--output-format", "github"]) == 1
    [annotation, verdict] = capsys.readouterr().out.splitlines()
    assert annotation.startswith("::notice file=copy/later.txt,title=ML708 ")
    assert ": later.txt is not listed%0A" in annotation
    assert ", 1 mismatch, " in verdict


def test_what_is_no_manifest_ends_with_2(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (adapter / "manifest.json").write_text('{"seed": 1, "seed": 2}')
    assert main(["verify", str(adapter)]) == 2
    assert "manifest.json: the key 'seed' appears twice" in capsys.readouterr().err


def test_note_makes_the_notes_again_and_keeps_the_authors_part(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note = adapter / "DECISION.md"
    written = with_author_section(note.read_text(), "We had to.")
    note.write_text(written.replace("Fine-tune tiny", "Fine-tune nothing"))
    (adapter / "README.md").unlink()
    assert main(["verify", str(adapter)]) == 1
    assert main(["note", str(adapter)]) == 0
    assert note.read_text() == written
    assert str(adapter / "README.md") in capsys.readouterr().out
    assert main(["verify", str(adapter)]) == 0


def test_a_known_mismatch_does_not_fail_and_a_report_has_each_value(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "later file.txt").write_text("later")
    nodeid = f"mistral-golden::{adapter.name}::manifest::files.later_file.txt"
    known, report = tmp_path / "known.txt", tmp_path / "report.json"
    assert main(["verify", str(adapter), "--write-xfails", str(known), "--report", str(report)]) == 1
    capsys.readouterr()
    assert f"{nodeid}  # " in known.read_text().splitlines()
    data = json.loads(report.read_text())
    checks = {check["nodeid"]: check for check in data["checks"]}
    assert (checks[nodeid]["outcome"], [cause["rule"] for cause in data["causes"]]) == ("failed", ["ML708"])
    assert checks[f"mistral-golden::{adapter.name}::manifest::seal"]["outcome"] == "passed"
    assert data["counts"]["failed"] == 1
    assert data["counts"]["not_checked"] == sum(check["outcome"] == "skipped" for check in data["checks"]) > 0
    known.write_text(known.read_text().replace("  # \n", "  # a note of ours\n"))
    words = ["verify", str(adapter), "--xfails", str(known)]
    assert main(words) == 0
    out = capsys.readouterr().out.splitlines()
    assert "known          files.later file.txt: is not listed" in out
    assert f"known {nodeid}: a note of ours (1 check)" in out
    assert ", 0 mismatch, 1 known, " in out[-2]
    assert main([*words, "--json"]) == 0
    [fact] = [fact for fact in json.loads(capsys.readouterr().out) if fact["state"] == "mismatch"]
    assert (fact["name"], fact["known"]) == ("files.later file.txt", ["a note of ours"])
    stale = f"mistral-golden::{adapter.name}::manifest::seal"
    known.write_text(f"{known.read_text()}{stale}  # it matches\n")
    assert main(words) == 1
    assert f"{stale} matches no finding" in capsys.readouterr().err


def test_a_list_of_check_serves_verify_too(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    known = tmp_path / "known.txt"
    known.write_text(f"mistral-golden::{adapter.name}::manifest::files-listed  # ours\nML709  # ours\n")
    assert main(["verify", str(adapter), "--xfails", str(known)]) == 0
    assert capsys.readouterr().out.count("not met: ") == 2
