"""Files of rows: every bad row is reported by file and line, and the good ones are streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_mistral_lora.chat.row_files import read_rows, scan_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, RowError, RowsError

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
GOOD = {"messages": [USER, ANSWER]}


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_all_bad_rows_are_reported_and_the_good_ones_streamed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        GOOD,
        "{",
        GOOD,
        {"messages": []},
        "",
        {"messages": [USER, {"role": "bot"}, ANSWER]},
        GOOD,
    )
    streamed: list[Row] = []
    with pytest.raises(RowsError) as caught:
        streamed.extend(read_rows(path))
    # a list that fails to extend keeps what it was given so far
    assert [str(row.place) for row in streamed] == [f"{path}:{n}" for n in (1, 3, 7)]
    errors = caught.value.errors
    assert str(caught.value) == "\n".join([f"{path}: 3 bad rows", *(f"  {error}" for error in errors)])
    assert [str(error.place) for error in errors] == [f"{path}:2", f"{path}:4", f"{path}:6, messages[1].role"]
    for error, values in zip(errors, (("column 2", "json.dumps"), ("empty",), ("'bot'", "'assistant'")), strict=True):
        assert [value for value in values if value not in str(error)] == []


def test_scanning_gives_rows_and_errors_in_file_order(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD, "{", GOOD)
    assert [type(item) for item in scan_rows(str(path))] == [Row, RowError, Row]


@pytest.mark.parametrize("lines", [[], ["", " "]])
def test_a_file_without_rows_is_an_error(tmp_path: Path, lines: list[str]) -> None:
    path = write(tmp_path / "rows.jsonl", *lines)
    with pytest.raises(RowsError) as caught:
        list(read_rows(path))
    assert str(caught.value) == f"{path}: 1 bad row\n  {path}: the file has no rows"


def test_a_file_of_good_rows_raises_nothing(tmp_path: Path) -> None:
    assert [row.to_json() for row in read_rows(write(tmp_path / "rows.jsonl", GOOD, GOOD))] == [GOOD, GOOD]


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: No such file or directory"):
        list(read_rows(tmp_path / "absent.jsonl"))


def test_at_most_20_bad_rows_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *("{" + " " * number for number in range(23)))
    with pytest.raises(RowsError) as caught:
        list(read_rows(path))
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{path}: 23 bad rows"
    assert len(lines) == 22
    assert lines[20].startswith(f"  {path}:20: ")
    assert lines[21] == "  … and 3 more"
    assert len(caught.value.errors) == 23


def test_rows_come_while_the_file_is_still_being_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(line * 1000)
    stream = read_rows(path)
    assert next(stream).to_json() == GOOD
    with path.open("ab") as file:
        file.write(line)
    assert sum(1 for _ in stream) == 1000
