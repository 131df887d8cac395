"""The place of a record that is not a line: its number and its line, in findings, errors and annotations."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.chat.row_files import scan_rows
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.conformance.finding import Finding
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.formats.sources import open_rows
from pytest_mistral_lora.places import NamedSource, Place
from pytest_mistral_lora.report.judged import FilePlace, file_place

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
WRONG = [{"role": "user", "content": "Hi"}]
CSV = 'prompt,completion\n\n"two\nlines",yes\nHi,Hello\n"three\n\nlines",\n'
PLACES = {
    "qa.csv": ["record 1, line 3", "record 2, line 5", "record 3, line 6"],
    "pretty.json": ["record 1, line 2", "record 2, line 14"],
    "short.json": ["record 1, line 1", "record 2, line 1"],
    "objects.json": ["record 1, line 1", "record 2, line 13"],
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with a file of each container whose records are not lines."""
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": TALK}, {"messages": WRONG}]
    texts = {
        "qa.csv": CSV,
        "pretty.json": json.dumps(rows, indent=2),
        "short.json": json.dumps(rows),
        "objects.json": "".join(json.dumps(row, indent=2) + "\n" for row in rows),
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def places(name: str) -> list[str]:
    return [str(item.place) for item in scan_rows(open_rows(Path(name))[0])]


@pytest.mark.parametrize("name", PLACES)
def test_each_record_has_its_number_and_its_line(name: str, files: Path) -> None:
    expected = [f"{name} {place}" for place in PLACES[name]]
    assert [place.partition(", messages")[0] for place in places(name)] == expected
    with gzip.open(f"{name}.gz", "wb") as file:
        file.write(Path(name).read_bytes())
    assert [place.partition(", messages")[0].replace(".gz", "") for place in places(f"{name}.gz")] == expected


def test_the_lines_of_a_long_file_are_counted_across_its_parts(tmp_path: Path) -> None:
    rows = [{"messages": [{**message, "content": "x" * 997} for message in TALK]} for _ in range(300)]
    file = tmp_path / "long.json"
    file.write_text(json.dumps(rows, indent=1))
    read = [item.place for item in scan_rows(open_rows(file)[0]) if not isinstance(item, RowError)]
    lines = file.read_text().splitlines()
    assert len(read) == 300
    assert all(place.line is not None and lines[place.line - 1] == " {" for place in read)
    assert len({place.line for place in read}) == 300


@pytest.mark.parametrize("blank", [0, 1, 70_000, 200_000])
def test_lines_between_records_are_counted_across_the_parts_of_a_file(blank: int, tmp_path: Path) -> None:
    file, between = tmp_path / "blank.json", "\n" * blank
    record = json.dumps({"messages": TALK})
    file.write_text(f"[{between}{record}{between},{record},{between}{record}{between}]\n")
    read = list(scan_rows(open_rows(file)[0]))
    assert [str(item.place) for item in read if not isinstance(item, RowError)] == [
        f"{file} record {number}, line {1 + number * blank}" for number in (1, 2, 3)
    ]


def test_text_behind_a_long_array_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "blank.json"
    file.write_text("[" + json.dumps({"messages": TALK}) + "\n" * 150_000 + "]\n\nmore")
    with pytest.raises(InputError, match="text follows the array") as caught:
        list(scan_rows(open_rows(file)[0]))
    assert str(caught.value.place) == f"{file} record 1, line 150003"


def test_a_check_and_its_annotations_name_the_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check", "pretty.json", "--tokenizer", "spm-v3", "--output-format"]
    assert main([*words, "github"]) == 1
    assert "::error file=pretty.json,line=14,title=ML601 " in capsys.readouterr().out


def test_a_finding_in_a_sound_record_has_its_line(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The finding comes from a pass over the rows in chunks, which keeps the numbers of records alone."""
    damaged = [TALK[0], {**TALK[1], "content": "Hello \ufffd"}]
    Path("twice.json").write_text(json.dumps([{"messages": damaged}, {"messages": TALK}], indent=2))
    main(["check", "twice.json", "--tokenizer", "spm-v3", "--json"])
    report = json.loads(capsys.readouterr().out)
    found = [cause["place"] for cause in report["causes"] if " record " in cause["place"]]
    assert "twice.json record 1, line 2" in {place.partition(", messages")[0] for place in found}


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Place.of("qa.csv", 3, 6).within("messages", 1, "role"), FilePlace(Path("qa.csv"), 6)),
        (Place.of("qa.csv", 3, 6), FilePlace(Path("qa.csv"), 6)),
        (Place.of("pretty.json", 4), FilePlace(Path("pretty.json"), 4)),
        (Place.of("none.csv", 3, 6), None),
        (Place(NamedSource("qa.csv", is_value=True), 3), None),
    ],
)
def test_a_place_in_a_file_is_an_annotation_of_its_line(place: Place, expected: Any, files: Path) -> None:
    assert file_place(place) == expected


def test_the_cause_has_neither_the_number_nor_the_line() -> None:
    causes = {
        Finding("ML601", "x", place).cause
        for place in (Place.of("a.csv", 3, 4) / "messages", Place.of("a.csv", 5, 9) / "messages")
    }
    assert len(causes) == 1
