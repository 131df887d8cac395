from __future__ import annotations

import io
import json
import subprocess
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pytest_mistral_lora.chat.reading import limits, loads_strict, scan_jsonl
from pytest_mistral_lora.errors import EXIT_BAD_INPUT, InputError, RowError

GOOD = b'{"a": 1}\n'
DUMPS, SAVES, LEAVES_OUT = "json.dumps", "iconv -f latin1 -t utf-8 {path} > utf8-rows.jsonl", "null"
REFUSED = [
    (b'{"a": }', ("not valid JSON", "column 7"), DUMPS),
    (b"{'a': 1}", ("single quotes", "column 2"), DUMPS),
    (b'{"a": 1} {"a": 2}', ("second value", "column 10"), DUMPS),
    (b'{"a": 1', ("not valid JSON", "column 8"), DUMPS),
    (b'{"a": "\ttab"}', ("control character", "column 8"), DUMPS),
    (b'{"a": "cut', ("not valid JSON", "column 7"), DUMPS),
    (b'{"a": 1, "a": 1}', ("'a' appears twice",), ""),
    (b'{"m": [{"x": {"weight": 0, "b": 1, "weight": 1}}]}', ("'weight' appears twice",), ""),
    (b'{"a": 1, "\\u0061": 2}', ("'a' appears twice",), ""),
    (b'{"a": NaN}', ("NaN is not",), LEAVES_OUT),
    (b"[1, [Infinity]]", ("Infinity is not",), LEAVES_OUT),
    (b'{"a": -Infinity}', ("-Infinity is not",), LEAVES_OUT),
    (b'{"a": [1e999]}', ("1e999",), LEAVES_OUT),
    (b'{"a": -1e999}', ("-1e999",), LEAVES_OUT),
    (b'{"a": ' + b"1" * 5000 + b"}", ("5000 characters",), ""),
    (b"[" * 100_000, ("nested too deeply",), ""),
    (b'{"a": "\xff"}', ("UTF-8", "byte 8"), SAVES),
    (b'{"a": "\xed\xa0\x80"}', ("UTF-8", "byte 8"), SAVES),
    (b'\xef\xbb\xbf{"a": 1}', ("byte order mark", "column 1"), DUMPS),
]


def scan(path: Path) -> list[Any]:
    return [str(item) if isinstance(item, RowError) else item for item in scan_jsonl(path)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("line", "values", "step"), REFUSED, ids=[" ".join(values) for _, values, _ in REFUSED])
def test_a_refused_line_is_named_and_the_lines_around_it_are_read(
    tmp_path: Path, line: bytes, values: tuple[str, ...], step: str
) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + line + b"\n" + GOOD)
    first, error, last = scan_jsonl(path)
    assert (first, last) == ((1, {"a": 1}), (3, {"a": 1}))
    assert isinstance(error, RowError)
    assert str(error.place) == f"{path}:2"
    assert [value for value in values if value not in error.found] == []
    assert step.format(path=path) in error.next_step
    assert bool(error.next_step) == bool(step)


def test_the_command_that_saves_as_utf8_can_be_pasted(tmp_path: Path) -> None:
    (tmp_path / "my rows.jsonl").write_bytes(GOOD + b'{"a": "h\xe9"}\n')
    [_, error] = scan_jsonl(tmp_path / "my rows.jsonl")
    assert isinstance(error, RowError)
    command = error.next_step.partition("for example: ")[2]
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert (tmp_path / "utf8-my rows.jsonl").read_text("utf-8").endswith('"hé"}\n')


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n \t\n\n", b""])
def test_blank_lines_and_any_line_end_carry_no_row(tmp_path: Path, end: bytes) -> None:
    path = write(tmp_path / "rows.jsonl", GOOD + b"\n\r\n" + b'{"a": 2}' + end)
    assert scan(path) == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_byte_order_mark_at_the_start_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + GOOD)
    assert scan(path) == [(1, {"a": 1})]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c"])
def test_only_a_newline_ends_a_line(tmp_path: Path, separator: str) -> None:
    escaped = json.dumps({"a": separator}, ensure_ascii=separator < " ")
    assert scan(write(tmp_path / "rows.jsonl", escaped.encode() + b"\n" + GOOD)) == [
        (1, {"a": separator}),
        (2, {"a": 1}),
    ]


@pytest.mark.parametrize(("excess", "refused"), [(0, False), (1, True), (100, True)])
def test_a_line_that_is_too_long_is_refused_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excess: int, refused: bool
) -> None:
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 20)
    line = b'"' + b"x" * (18 + excess) + b'"'
    path = write(tmp_path / "rows.jsonl", GOOD + line + b"\n" + GOOD)
    found = f"{path}:2: the row has {20 + excess + 1} bytes; expected at most 20 bytes (0 MiB)"
    expected = found if refused else (2, "x" * 18)
    assert scan(path) == [(1, {"a": 1}), expected, (3, {"a": 1})]


def test_the_largest_row_has_20_mib() -> None:
    assert limits.MAX_ROW_BYTES == 20 * 2**20


def test_a_long_last_line_without_newline_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 20)
    path = write(tmp_path / "rows.jsonl", GOOD + b"1" * 65)
    first, refused = scan(path)
    assert first == (1, {"a": 1})
    assert refused.startswith(f"{path}:2: ")
    assert "65 bytes; expected at most 20 bytes" in refused


@pytest.mark.parametrize(("name", "said"), [("absent.jsonl", "No such file or directory"), ("", "Is a directory")])
def test_a_file_that_cannot_be_opened_is_an_input_error(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        next(scan_jsonl(tmp_path / name))
    step = "" if name else f". Convert it: mistral-lora import {tmp_path} --to rows.jsonl"
    assert str(caught.value) == f"{tmp_path / name}: cannot be read: {said}{step}"
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_a_row_is_there_before_the_next_is_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(GOOD + b" " * longer_than_a_buffer())
    rows = scan_jsonl(path)
    assert next(rows) == (1, {"a": 1})
    with path.open("ab") as file:
        file.write(b"\n" + GOOD)
    assert list(rows) == [(3, {"a": 1})]


def longer_than_a_buffer() -> int:
    """More than what a buffered reader waits for before it hands out the first line."""
    return io.DEFAULT_BUFFER_SIZE


def test_a_large_file_is_never_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = json.dumps({"text": "x" * 1000}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(20):
            file.write(line * 1000)
    tracemalloc.start()
    try:
        count = sum(1 for _ in scan_jsonl(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 20_000
    assert path.stat().st_size > 20e6
    assert peak < 1e6


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(value=JSON, ascii_only=st.booleans())
def test_what_is_json_is_read_as_it_was_written(value: Any, ascii_only: bool) -> None:
    assert loads_strict(json.dumps(value, ensure_ascii=ascii_only)) == value


@given(text=st.text(alphabet='{}[]:,"\\ \n019.eE+-trufalsn', max_size=12))
def test_what_is_not_json_is_refused_with_the_column(text: str) -> None:
    assume(not is_json(text))
    with pytest.raises(ValueError, match=r"^not valid JSON: .* at (line \d+, )?column \d+$"):
        loads_strict(text)


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
