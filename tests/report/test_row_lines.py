"""The row of a cause in a report is the line that its place names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.report import row_lines
from pytest_mistral_lora.report.row_lines import with_rows

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def cause_of(check: str, place: Place, row: str = "") -> dict[str, Any]:
    return {**Finding("ML601", "x", place, row=row).to_json(), "check": check}


@pytest.mark.parametrize(
    "bad", ['{"messages": [}', json.dumps({"messages": [{"role": "usr", "content": "x"}, TURNS[1]]})]
)
def test_a_card_shows_the_line_that_is_at_fault(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text(f"{json.dumps({'messages': TURNS})}\n{bad}\n")
    assert main(["check", "rows.jsonl", "--tokenizer", "spm-v3", "--report", "x.json", "--report", "x.html"]) == 1
    [cause] = (cause for cause in json.loads(Path("x.json").read_text())["causes"] if cause["severity"] == "error")
    assert (cause["place"].partition(",")[0], cause["row"]) == ("rows.jsonl:2", bad)
    page = Path("x.html").read_text()
    assert "The row:" in page
    assert "Repeat it:" in page


def test_a_line_is_bounded_and_printable_and_a_secret_in_it_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MY_TOKEN", "s3cret-value-of-mine")
    messages: list[dict[str, Any]] = [
        {"role": "usr", "content": "s3cret-value-of-mine \x1b[31m" + "x" * 9000},
        TURNS[1],
    ]
    Path("rows.jsonl").write_text(
        f"{json.dumps({'messages': messages}, ensure_ascii=False)}\n{json.dumps({'messages': TURNS})}"
    )
    assert main(["check", "rows.jsonl", "--tokenizer", "spm-v3", "--report", "x.json"]) == 1
    text = Path("x.json").read_text()
    [cause] = (cause for cause in json.loads(text)["causes"] if cause["severity"] == "error")
    assert "s3cret" not in text
    assert "***" in cause["row"]
    assert len(cause["row"]) < 5000


@pytest.mark.parametrize(("longer", "end"), [(0, '"}'), (1, "…")])
def test_a_row_of_so_many_characters_is_shown_in_full(
    longer: int, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f'{{"a": "{"x" * (4000 - 9 + longer)}"}}\n')
    cause = cause_of("rows::dataset::rows", Place.of(file, record=1) / "a")
    [found] = with_rows([cause])
    assert (len(found["row"]), found["row"].endswith(end)) == (4000 + longer, True)
    # a file at its bound is read again, and a larger one is not
    assert row_lines._LARGEST == 64 << 20
    monkeypatch.setattr(row_lines, "_LARGEST", file.stat().st_size)
    assert with_rows([cause]) == [found]
    monkeypatch.setattr(row_lines, "_LARGEST", file.stat().st_size - 1)
    assert with_rows([cause]) == [cause]


def test_a_cause_gets_the_line_of_its_place_if_it_is_of_rows_and_has_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\n\n{"a": 4}\n')
    given = [
        ("a::dataset::rows", Place.of(file, record=2) / "a", "", '{"a": 2}'),
        ("a::encoded::file", Place.of(file, record=4), "", '{"a": 4}'),
        ("a::dataset::rows", Place.of(file, record=1), "kept", "kept"),
        ("a::adapter::files", Place.of(file, record=1), "", ""),
        ("a::dataset::rows", Place.of(file), "", ""),
        ("a::dataset::rows", Place.of(file, record=9), "", ""),
        ("a::dataset::rows", Place.of(tmp_path / "gone.jsonl", record=1), "", ""),
    ]
    found = with_rows([cause_of(check, place, row) for check, place, row, _ in given])
    assert [cause["row"] for cause in found] == [shown for *_, shown in given]
