"""Data in any format, opened as rows with their places."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from imported import lines
from pyarrow import parquet

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.reading.chunks import DataFile, chunks
from pytest_mistral_lora.chat.row_files import read_rows, scan_rows
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError, RowError, RowsError
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.sources import (
    ConvertedSource,
    open_rows,
    recorded_file,
    rows_of,
)
from pytest_mistral_lora.records.files import sha256_rows
from pytest_mistral_lora.strategies import rows

PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


def sharegpt(question: str, *answers: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, *({"from": "gpt", "value": one} for one in answers)]
    return {"conversations": turns}


def row(question: str, answer: str) -> Row:
    return parse_row({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def test_rows_have_the_places_of_the_source(tmp_path: Path) -> None:
    path = tmp_path / "talks.json"
    path.write_text(json.dumps([sharegpt("1", "one"), sharegpt("2"), sharegpt("3", "three")], indent=1))
    first, error, last = rows_of(path)
    assert (first, last) == (row("1", "one"), row("3", "three"))
    assert isinstance(first, Row)
    assert isinstance(last, Row)
    assert isinstance(error, RowError)
    assert (str(first.place), str(last.place)) == (f"{path} record 1, line 2", f"{path} record 3, line 22")
    assert str(error.place) == f"{path} record 2, line 14, messages"
    assert "no assistant message" in error.found
    with pytest.raises(RowsError, match=r"talks\.json record 2, line 14"):
        list(read_rows(open_rows(path)[0]))


def test_a_loss_is_the_error_of_its_row_until_it_is_allowed(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(lines([PAIR, PAIR]))
    errors = list(rows_of(path))
    assert all(isinstance(error, RowError) and error.found == "this is a preference pair" for error in errors)
    assert "lossy: [rejected]" in str(errors[0])
    assert list(rows_of(path, lossy=["rejected"])) == [row("a", "b")] * 2
    with pytest.raises(InputError, match="unknown kind 'reject'"):
        open_rows(path, lossy=["reject"])


def test_a_file_of_which_every_record_is_left_out_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "marked.jsonl"
    path.write_bytes(lines([{"prompt": "a", "completion": "b", "label": False}] * 3))
    with pytest.raises(InputError, match="each of 3 records is left out"):
        list(rows_of(path, lossy=["unwanted"]))


def test_chunks_of_a_source_are_its_rows_and_count_its_bytes(tmp_path: Path) -> None:
    records = [sharegpt(f"question {n}", f"answer {n}") for n in range(700)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(records)))
    parquet.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.json").write_text(json.dumps(records))
    for path in sorted(tmp_path.iterdir()):
        found = list(chunks(open_rows(path), lambda error: pytest.fail(str(error))))
        assert [number for one in found for number, _ in one.lines] == list(range(1, 701))
        assert len(found) == 3
        # what a chunk read ahead counts with it
        assert sum(one.size for one in found) == pytest.approx(path.stat().st_size, rel=0.01)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=rows(tools=None, weights=True, alternating=False, parallel=True, thinking=True))
def test_rows_through_a_source_are_the_rows_themselves(tmp_path: Path, data: dict[str, Any]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(data) + "\n")
    [file] = open_rows(path)
    assert list(scan_rows(file)) == list(scan_rows(path)) == [parse_row(data)]
    assert isinstance(file.source, ConvertedSource)
    assert file.source.rows_sha256 == sha256_rows([parse_row(data)])


def test_the_facts_of_a_source_open_it_again(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(
        json.dumps([{"talk": [{"who": "me", "what": "a"}, {"who": "bot", "what": "b"}]}])
    )
    roles = {"me": "user", "bot": "assistant"}
    layout = Layout("sharegpt", {"messages": "talk"}, {"role": "who", "content": "what"}, roles, joined=True)
    [file] = open_rows(tmp_path / "mine.json", layout=layout)
    assert isinstance(file.source, ConvertedSource)
    assert list(scan_rows(file)) == [row("a", "b")]
    source = json.loads(json.dumps(file.source.facts()))
    again = recorded_file(file.path, {"source": source})
    assert list(scan_rows(again)) == [row("a", "b")]
    assert isinstance(again.source, ConvertedSource)
    assert again.source.facts() == source
    assert recorded_file(file.path, {}) == DataFile(file.path)
    with pytest.raises(InputError, match="format 'later'"):
        list(scan_rows(recorded_file(file.path, {"source": {**source, "format": "later"}})))


@pytest.mark.parametrize(
    "layout",
    [
        Layout("messages", {"messages": "talk"}, {"role": "who"}, {"bot": "assistant"}, frozenset({"assistant"})),
        Layout("alpaca", templates=("{instruction} {input} ", "{instruction} "), system="Be brief.", joined=True),
        Layout("messages", trained=frozenset(), drop_system=True),
        Layout("sharegpt"),
    ],
)
def test_a_layout_comes_back_from_json(layout: Layout) -> None:
    assert Layout.from_json(layout.format, json.loads(json.dumps(layout.to_json()))) == layout


def test_shards_are_one_table_in_their_order(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for number in (2, 0, 1):
        table = pa.Table.from_pylist([sharegpt(str(number), "yes")])
        parquet.write_table(table, folder / f"train-{number:05}-of-00003.parquet")
    assert list(rows_of(folder)) == [row(str(number), "yes") for number in range(3)]
    (folder / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(InputError, match=r"has 2 data files: train-00000-of-00003\.parquet"):
        open_rows(folder)


def test_the_memory_of_a_source_does_not_grow_with_it(tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    peaks = []
    for count in (1000, 2500):  # from a thousand on, the buffer of the text is full
        path.write_text(json.dumps([sharegpt("question " * 20, "answer " * 20)] * count))
        tracemalloc.start()
        assert sum(isinstance(one, Row) for one in rows_of(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"conversations": [1]}, "conversations: is a number"),
        ({"conversations": ["hello"]}, "conversations: a text that is not valid JSON"),
        ({"messages": [["a", "b"]]}, "messages[0]: is a string; expected a message"),
        ({"messages": [{"role": "user", "content": "x"}]}, "messages: is an object"),
        (
            {"messages": [[{"role": "user", "content": 1}, {"role": "assistant", "content": 2}]]},
            "messages[0].content",
        ),
        ({"messages": [[{"role": "assistant", "content": "a", "weight": "high"}]]}, "messages[0].weight: 'high'"),
        ({"prompt": [b"a"], "completion": [b"b"]}, "prompt[0]: is a number; expected a message"),
        ({"instruction": ["a"], "output": [datetime(2020, 1, 1)]}, "output: is datetime; expected a list of messages"),
    ],
)
def test_a_column_of_another_type_is_an_error_with_its_row_and_field(
    tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table(columns), path)
    [error] = rows_of(path)
    assert isinstance(error, RowError)
    assert said in str(error)
    assert str(error.place).startswith(f"{path}:1, ")


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout("alpaca", {"instruction": "question", "output": "output"}), "question: is missing; expected a text"),
        (Layout("alpaca", {"instruction": "instruction", "output": "answer"}), "answer: is missing"),
        (Layout("sharegpt", {"messages": "talk"}), "talk: is missing; expected a list of messages"),
    ],
)
def test_a_declared_column_that_is_missing_is_an_error(tmp_path: Path, layout: Layout, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"instruction": "a", "output": "b"}]))
    [error] = rows_of(tmp_path / "a.jsonl", layout=layout)
    assert said in str(error)


def test_a_declared_column_that_a_row_can_do_without_is_a_remark_if_no_record_has_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines([{"instruction": "a", "output": "b"}]))
    layout = Layout("alpaca", {"instruction": "instruction", "output": "output", "system": "sys"})
    [file] = open_rows(tmp_path / "a.jsonl", layout=layout)
    assert list(scan_rows(file)) == [row("a", "b")]
    assert isinstance(file.source, ConvertedSource)
    assert file.source.report.remarks == [f"no record of {tmp_path / 'a.jsonl'} has the declared key 'sys'"]
