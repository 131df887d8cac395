"""No data file takes more than its bounds: each attack beside a sound file of the same kind."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fuzzing import PEAK, run_verb
from imported import lines
from pyarrow import parquet

from pytest_mistral_lora.chat.container import ARROW_STREAM, PARQUET
from pytest_mistral_lora.chat.reading import limits
from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.formats import tables
from pytest_mistral_lora.formats.containers import open_source
from pytest_mistral_lora.formats.conversation import convert_messages
from pytest_mistral_lora.formats.layouts import Layout
from pytest_mistral_lora.formats.tool_calls import ToolCalls
from pytest_mistral_lora.places import Place

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs the limits of Linux")
ANSWERS = {"instruction": ["a" * 8, "b" * 8] * 50, "output": ["c" * 8, "d" * 4] * 50}


def read(path: Path) -> list[Any]:
    return [record.value for record in open_source(path).records(lambda read: None)]


def write_stream(path: Path, data: pa.Table, open_file: Callable[..., Any] = pa.ipc.new_stream) -> None:
    with path.open("wb") as file, open_file(file, data.schema) as writer:
        writer.write_table(data)


def refused(path: Path) -> str:
    """The error of an import, which takes no memory and leaves no file."""
    found = run_verb(["import", path.name, "--to", "rows.jsonl"], path.parent, seconds=120)
    assert (found.code, found.hung) == (2, False), found.output
    assert found.output.startswith("error: "), found.output
    assert found.peak < PEAK + path.stat().st_size / 2**20
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    return found.output


@linux
@pytest.mark.parametrize("open_file", [pa.ipc.new_stream, pa.ipc.new_file])
def test_wrong_offsets_of_arrow_are_an_error(tmp_path: Path, open_file: Callable[..., Any]) -> None:
    data = pa.table(ANSWERS)
    path = tmp_path / "a.arrow"
    write_stream(path, data, open_file)
    assert len(read(path)) == 100
    offsets = data["instruction"].chunk(0).buffers()[1].to_pybytes()[:404]
    wrong = np.arange(2**30, 2**30 + 101, dtype=np.int32).tobytes()
    content = path.read_bytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, offsets[:4] + wrong[4:]))
    assert "a.arrow: cannot be read as an Arrow" in refused(path)


def dictionary(size: int, rows: int) -> pa.Table:
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))
    return pa.table({"instruction": texts, "output": ["a"] * rows})


@linux
@pytest.mark.parametrize("form", ["parquet", "arrow"])
def test_a_large_text_that_many_rows_share_is_refused_by_row(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    data = dictionary(25_000_000, 2000)
    if form == "parquet":
        parquet.write_table(data, path, compression="zstd")
        assert path.stat().st_size < 5000
    else:
        write_stream(path, data)
    assert f"a.{form}:1: the row has 25,000,0" in refused(path)


def test_a_table_of_a_few_bytes_that_stands_for_gigabytes_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_ALWAYS", 1 << 20)
    path = tmp_path / "a.parquet"
    parquet.write_table(dictionary(100_000, 10), path, compression="zstd")
    assert len(read(path)) == 10
    parquet.write_table(dictionary(100_000, 3000), path, compression="zstd")
    size = path.stat().st_size
    with pytest.raises(InputError, match=rf"a\.parquet: {size:,} bytes .*[\d,]+ bytes"):
        read(path)


@linux
@pytest.mark.parametrize(
    "kind", [pytest.param("null", marks=pytest.mark.slow), "struct", pytest.param("fixed", marks=pytest.mark.slow)]
)
def test_nulls_of_a_row_are_counted(tmp_path: Path, kind: str) -> None:
    count = 500_000_000
    inner = pa.nulls(count)
    if kind == "struct":
        inner = pa.StructArray.from_arrays([inner], ["name"])
    elif kind == "fixed":
        inner = pa.FixedSizeListArray.from_arrays(inner, 1000)
    lists = pa.ListArray.from_arrays(pa.array([0, len(inner)], pa.int32()), inner)
    path = tmp_path / "a.arrow"
    write_stream(path, pa.table({"messages": lists}))
    size = {"null": 4_000_000_024, "struct": 10_000_000_024, "fixed": 4_004_000_024}[kind]
    assert re.search(rf"a\.arrow:1: .*{size:,} bytes; expected at most 20,971,520", refused(path))
    write_stream(path, pa.table({"messages": pa.ListArray.from_arrays([0, 10], pa.nulls(10))}))
    assert read(path) == [{"messages": [None] * 10}]


@linux
@pytest.mark.parametrize(
    "start", ["instruction,output\n", "instruction,", 'instruction,output\na,"'], ids=["line", "header", "quote"]
)
def test_a_row_of_csv_without_an_end_is_refused(tmp_path: Path, start: str) -> None:
    path = tmp_path / "a.csv.packed"
    more = "b" * 999 + ("\n" if start.endswith('"') else "b")
    path.write_bytes(gzip.compress(start.encode()) + gzip.compress(more.encode() * 1000) * 30)
    found = r"a\.csv\.packed record 1, line [12]: .*20,971,521 bytes.* at most 20,971,520"
    assert re.search(found, refused(path))


def test_a_row_of_csv_in_utf_16_without_an_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(("instruction,output\n" + "a" * 21_000_000).encode("utf-16"))
    with pytest.raises(InputError, match=r"a\.csv record 1, line 2: .*20,971,521 bytes"):
        read(path)


def test_many_empty_lines_of_csv_are_no_long_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 50)
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "\n" * 60 + '1,2\n"' + "x" * 10 + '\n",3\n' * 1 + "\n" * 60)
    assert read(path) == [{"a": "1", "b": "2"}, {"a": "x" * 10 + "\n", "b": "3"}]


def test_rows_behind_a_long_one_are_read_as_fast_as_others(tmp_path: Path) -> None:
    rows = [{"instruction": f"{n}" + "z" * 300, "output": "y"} for n in range(20_000)]
    seconds = {}
    for size in (1, 18_000_000):
        path = tmp_path / f"{size}.json"
        path.write_text(json.dumps([{"instruction": "x" * size, "output": "y"}, *rows]))
        start = time.process_time()
        assert len(read(path)) == 20_001
        seconds[size] = time.process_time() - start
    # it took eight seconds more, to copy the text for each row
    assert seconds[18_000_000] < 5 * seconds[1] + 1


def test_the_row_of_an_array_that_is_too_large_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 100)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, {"a": "x" * 100}, {"a": 2}]))
    first, error, last = read(path)
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert str(error.place) == f"{path} record 2, line 1"
    assert "109 bytes; expected at most 100 bytes" in str(error)
    path.write_text('[{"a": "' + "x" * 200_000)
    with pytest.raises(InputError, match=r"a\.json record 1, line 1: .*65,5\d\d bytes.* at most 100 bytes"):
        read(path)


@pytest.mark.parametrize("form", [PARQUET, ARROW_STREAM])
def test_the_row_of_a_table_that_is_too_large_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 1000)
    data = pa.table({"a": ["x" * (2000 if n == 7 else n) for n in range(300)]})
    path = tmp_path / "a"
    if form == PARQUET:
        parquet.write_table(data, path, row_group_size=100)
    else:
        write_stream(path, data)
    found = read(path)
    assert [value for value in found if not isinstance(value, RowError)] == [
        {"a": "x" * n} for n in range(300) if n != 7
    ]
    assert str(found[7].place) == f"{path}:8"
    assert "2,017 bytes; expected at most 1,000 bytes" in str(found[7])


N = 700
COLUMNS: dict[str, Any] = {
    "dictionary": pa.array([["a", "bc", None][n % 3] for n in range(N)]).dictionary_encode(),
    "large string": pa.array(["x" * (n % 40) for n in range(N)], pa.large_string()),
    "view": pa.array([f"a text that is in no view {n}" if n % 2 else None for n in range(N)], pa.string_view()),
    "binary": pa.array([b"\xff" * (n % 9) for n in range(N)]),
    "null": pa.nulls(N),
    "bool": pa.array([n % 2 == 0 for n in range(N)]),
    "map": pa.array([[("a", n), ("a", 2)] for n in range(N)], pa.map_(pa.string(), pa.int64())),
    "fixed": pa.array([[n, None] for n in range(N)], pa.list_(pa.int32(), 2)),
    "fixed of texts": pa.array([["a" * (n % 5), None] for n in range(N)], pa.list_(pa.string(), 2)),
    "list": pa.array([[1.5] * (n % 3) if n % 5 else None for n in range(N)], pa.large_list(pa.float32())),
    "list view": pa.array([["a"] * (n % 3) for n in range(N)], pa.list_view(pa.string())),
    "struct": pa.array([{"a": "x" * (n % 7), "b": [{"c": n}] * (n % 3)} if n % 4 else None for n in range(N)]),
    "empty lists": pa.array([[] for _ in range(N)], pa.list_(pa.string())),
    "time": pa.array([n * 10**12 for n in range(N)], pa.timestamp("us", "Europe/Berlin")),
    "date": pa.array(range(N), pa.date32()),
    "duration": pa.array(range(N), pa.duration("ms")),
    "clock": pa.array(range(N), pa.time32("s")),
    "decimal": pa.array([decimal.Decimal(n) for n in range(N)], pa.decimal256(40, 2)),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(16)] * N, pa.binary(16))),
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("most", [200, pytest.param(5000, marks=pytest.mark.slow), 1 << 20])
def test_every_type_is_read_as_pyarrow_reads_it_however_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", most)
    data = pa.table({"n": range(N), name: COLUMNS[name]}).slice(3)
    path = tmp_path / "a.arrow"
    write_stream(path, data)
    assert read(path) == data.to_pylist()
    for piece in tables.pieces(path, ARROW_STREAM):
        # the measure is no less than the texts
        assert len(json.dumps(piece.values, default=lambda value: str(value)[:1])) < 6 * most or len(piece.values) == 1


NOT_READ = {
    "dense_union": pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])]),
    "sparse_union": pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array([1])]),
    "run_end_encoded": pa.RunEndEncodedArray.from_arrays(pa.array([1], pa.int32()), pa.array([1], pa.int8())),
}


@pytest.mark.parametrize("kind", NOT_READ)
def test_a_type_that_is_not_read_is_an_error_that_names_it(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.arrow"
    write_stream(path, pa.table({"a": NOT_READ[kind]}))
    with pytest.raises(InputError, match=rf"a.arrow: a column holds {kind}<.*, which is not read"):
        read(path)


def test_nanoseconds_are_read_without_pandas_objects(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_stream(path, pa.table({"a": pa.array([1000], pa.timestamp("ns")), "b": pa.array([1000], pa.duration("ns"))}))
    [value] = read(path)
    assert (type(value["a"]), type(value["b"])) == (datetime.datetime, datetime.timedelta)


def test_the_reader_hands_over_values_and_nothing_that_runs() -> None:
    for value in (os.system, tables.serve, Path()):
        with pytest.raises(pickle.UnpicklingError):
            tables._Plain(io.BytesIO(pickle.dumps(value))).load()
    found, data = tables._pickled([{"a": Path("b")}])
    assert tables._Plain(io.BytesIO(data)).load() == [{"a": "b"}]
    assert found["size"] == len(data)


@pytest.fixture
def many_pieces(tmp_path: Path) -> Path:
    path = tmp_path / "a.arrow"
    write_stream(path, pa.table({"a": [str(n) for n in range(10_000)]}))
    return path


@linux
def test_a_reader_that_is_taken_down_is_an_error_with_its_place(many_pieces: Path) -> None:
    pieces = tables.pieces(many_pieces, ARROW_STREAM)
    next(pieces)
    # the file is mapped, and what is gone from it cannot be read
    os.truncate(many_pieces, 4096)
    with pytest.raises(InputError) as caught:
        list(pieces)
    assert re.search(r"after row 256 .*\(SIGBUS\)", str(caught.value))
    write_stream(many_pieces, pa.table({"a": ["1"]}))
    assert read(many_pieces) == [{"a": "1"}]


@linux
def test_a_reader_that_takes_too_long_is_an_error(many_pieces: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables._end_idle()
    pieces = tables.pieces(many_pieces, ARROW_STREAM)
    next(pieces)
    monkeypatch.setattr(tables, "_SECONDS", 0.3)
    [reader] = _readers()
    os.kill(reader, signal.SIGSTOP)
    with pytest.raises(InputError, match=r"after row 256 .* 0\.3 seconds"):
        list(pieces)


def _readers() -> list[int]:
    children = [process for process, _, parent, _ in _processes() if parent == os.getpid()]
    return [one for one in children if "formats.tables" in Path(f"/proc/{one}/cmdline").read_text()]


def _processes() -> Iterator[tuple[int, str, int, int]]:
    """Yield the number, the state, the parent and the group of each process."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent, group = (process / "stat").read_text().rpartition(")")[2].split()[:3]
            yield int(process.name), state, int(parent), int(group)


def test_two_tables_are_read_at_the_same_time_and_one_process_reads_many(tmp_path: Path) -> None:
    for name in "ab":
        write_stream(tmp_path / name, pa.table({"a": [f"{name}{n}" for n in range(600)]}))
    both = zip(*(open_source(tmp_path / name).records(lambda read: None) for name in "ab"), strict=True)
    assert [(one.value["a"], other.value["a"]) for one, other in both] == [(f"a{n}", f"b{n}") for n in range(600)]
    before = {id(process) for process in tables._idle[os.getpid()]}
    for name in "abab":
        read(tmp_path / name)
        # of this one, the rest is not asked for
        next(open_source(tmp_path / name).records(lambda read: None))
    assert {id(process) for process in tables._idle[os.getpid()]} == before


@pytest.fixture
def reader_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Give the readers of tables another limit of memory."""

    def give(size: int) -> None:
        monkeypatch.setattr(limits, "READ_MEMORY", size)
        tables._end_idle()

    yield give
    tables._end_idle()


def write_elsewhere(path: Path, script: str) -> None:
    """Write a large table in a process of its own: the tests' process would keep the memory that it takes."""
    subprocess.run([sys.executable, "-c", f"import sys\nimport pyarrow as pa\n{script}", path], check=True)


LARGE_ROWS = """
from pyarrow import parquet
texts = pa.table({"a": [str(n) * 4_000_000 for n in range(32)]})
parquet.write_table(texts, sys.argv[1], use_dictionary=False, write_batch_size=1)
"""
LARGE_BATCH = """
data = pa.table({"a": ["x" * 200_000_000]})
options = pa.ipc.IpcWriteOptions(compression="zstd")
with open(sys.argv[1], "wb") as file, pa.ipc.new_stream(file, data.schema, options=options) as writer:
    writer.write_table(data)
"""


@linux
def test_large_rows_of_parquet_are_read_one_at_a_time(tmp_path: Path, reader_memory: Callable[[int], None]) -> None:
    # all rows at once would take more than the reader may have
    reader_memory(160 << 20)
    path = tmp_path / "a.parquet"
    write_elsewhere(path, LARGE_ROWS)
    records = open_source(path).records(lambda read: None)
    assert all(record.value["a"] == str(n) * 4_000_000 for n, record in zip(range(32), records, strict=True))


@linux
def test_a_batch_that_takes_too_much_memory_is_an_error(tmp_path: Path, reader_memory: Callable[[int], None]) -> None:
    reader_memory(100 << 20)
    path = tmp_path / "a.arrow"
    write_elsewhere(path, LARGE_BATCH)
    with pytest.raises(InputError, match=r"after row 0 .* 104,857,600 bytes"):
        read(path)


def test_a_file_that_is_packed_too_well_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"a": "x" * 1000} for _ in range(5000)]
    path = tmp_path / "a.jsonl.packed"
    path.write_bytes(gzip.compress(lines(rows)))
    assert read(path) == rows
    monkeypatch.setattr(limits, "_ALWAYS", 1 << 20)
    monkeypatch.setattr(limits, "_RATIO", 1)
    with pytest.raises(InputError, match=r"expected at most 1,048,576 bytes"):
        read(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_and_a_device_are_refused_unread(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    found = run_verb(["import", "a.jsonl", "--to", "rows.jsonl"], tmp_path, seconds=30)
    assert (found.code, found.hung) == (2, False)
    assert "a.jsonl: is not a regular file" in found.output


@linux
@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 130)]
)
def test_a_signal_leaves_no_unfinished_file_and_no_reader(tmp_path: Path, number: int, code: int) -> None:
    write_stream(tmp_path / "a.arrow", pa.table({"instruction": ["a" * 500] * 200_000, "output": ["b"] * 200_000}))
    words = [sys.executable, "-m", "pytest_mistral_lora.cli", "import", "a.arrow", "--to", "rows.jsonl"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, start_new_session=True)
    end = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob(".rows.jsonl.*.unfinished")):
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == code
    assert [path.name for path in tmp_path.iterdir()] == ["a.arrow"]
    # its pipe is closed, which ends it at once or behind the rows that it reads; nobody may have waited for it
    while any(group == process.pid and state != "Z" for _, state, _, group in _processes()):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_names_that_each_row_would_have_again_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    column = pa.array([{"n" * 1_100_000: "a"}])
    write_stream(path, pa.table({"messages": column}))
    with pytest.raises(InputError, match=r"a\.arrow: the names .* 1,100,008 bytes; expected at most 1,048,57"):
        read(path)


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_long_name_is_cut_in_an_error(tmp_path: Path, form: str) -> None:
    path = tmp_path / f"a.{form}"
    name = "n" * 1_000_000
    if form == "csv":
        path.write_text(f"{name},{name}\n1,2\n")
        said = "two columns have one name: " + "n" * 60
    else:
        parquet.write_table(pa.table({name: [1]}), path)
        said = "no known format: keys " + "n" * 60
    found = run_verb(["import", path.name, "--to", "rows.jsonl"], tmp_path)
    assert found.code == 2
    assert said in found.output
    assert len(found.output) < 1000


def test_the_limit_of_the_process_on_fields_of_csv_is_never_made_smaller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other readers of CSV in the process keep theirs: Python reads the files of a package by it."""
    before = csv.field_size_limit()
    monkeypatch.setattr(limits, "MAX_ROW_BYTES", 50)
    (tmp_path / "rows.csv").write_text("question,answer\nWhy?,Because.\n")
    assert [record.value for record in open_source(tmp_path / "rows.csv").records(lambda read: None)]
    assert csv.field_size_limit() >= before


def test_a_long_list_of_messages_takes_no_more_memory_before_its_first_fault() -> None:
    messages: list[dict[str, Any]] = [{} for _ in range(120_000)]
    place = Place.of("a.jsonl", record=1) / "messages"
    tracemalloc.start()
    try:
        with pytest.raises(RowError, match=r"messages\[0\]\.from: is missing"):
            convert_messages(messages, place, Layout(), ToolCalls(padded=False), padded=False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # a place for each message took 16 MB here, and 840 MiB for a file of 18 MB
    assert peak < 10 << 20
