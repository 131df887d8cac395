from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imported import lines
from pyarrow import parquet

from pytest_mistral_lora.errors import InputError, RowError
from pytest_mistral_lora.formats import containers
from pytest_mistral_lora.formats.containers import open_source
from pytest_mistral_lora.formats.files import source_files

RECORDS: list[dict[str, Any]] = [
    {"instruction": "é\n\u2028 😀", "input": "", "output": '"quoted", \\ and [brackets] }'},
    {"instruction": "b", "input": "c", "output": "d" * 80_000},
    {"instruction": "e", "input": "f", "output": "g"},
]


def table(records: Any, delimiter: str = ",") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue().encode()


def write_parquet(path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=2)


def write_arrow(path: Path, open_file: Callable[..., Any] = pa.ipc.new_stream) -> None:
    data = pa.Table.from_pylist(RECORDS)
    with path.open("wb") as file, open_file(file, data.schema) as writer:
        writer.write_table(data, max_chunksize=2)


def read(path: Path) -> list[Any]:
    return [record.value for record in open_source(path).records(lambda read: None)]


FORMS: list[tuple[str, Any, str]] = [
    ("a.jsonl", lines(RECORDS), "JSON Lines"),
    ("a.jsonl", b"\xef\xbb\xbf" + lines(RECORDS).replace(b"\n", b"\r\n\r\n"), "JSON Lines"),
    ("a.json", json.dumps(RECORDS).encode(), "a JSON array"),
    ("a.json", b"\xef\xbb\xbf" + json.dumps(RECORDS, indent=4, ensure_ascii=False).encode(), "a JSON array"),
    ("a.json", "\n".join(json.dumps(one, indent=1) for one in RECORDS).encode(), "JSON objects over several lines"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS)), "gzip of JSON Lines"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS[:1])) + gzip.compress(lines(RECORDS[1:])), "gzip of JSON Lines"),
    ("a.csv.gz", gzip.compress(table(RECORDS)), "gzip of CSV"),
    ("a.jsonl", lines(RECORDS).decode().encode("utf-16"), "UTF-16 of JSON Lines"),
    ("a.json", json.dumps(RECORDS).encode("utf-16-be"), "UTF-16-BE of a JSON array"),
    ("a.jsonl", lines(RECORDS).decode().encode("utf-16-le"), "UTF-16-LE of JSON Lines"),
    ("a.jsonl", lines(RECORDS).decode().encode("utf-32"), "UTF-32 of JSON Lines"),
    ("a.csv", table(RECORDS), "CSV"),
    ("a.csv", b"\xef\xbb\xbf" + table(RECORDS, ";"), "CSV"),
    ("a.csv", table(RECORDS).decode().encode("utf-16"), "UTF-16 of CSV"),
    ("a.tsv", table(RECORDS, "\t"), "TSV"),
    ("a.parquet", write_parquet, "Parquet"),
    ("a.arrow", write_arrow, "an Arrow stream"),
    ("a.arrow", lambda path: write_arrow(path, pa.ipc.new_file), "an Arrow file"),
]


@pytest.mark.parametrize(("name", "content", "title"), FORMS, ids=[f"{form[0]}-{form[2]}" for form in FORMS])
def test_every_container_gives_the_same_records(tmp_path: Path, name: str, content: Any, title: str) -> None:
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    file = open_source(path)
    assert file.title == title
    found = list(file.records(lambda read: None))
    assert [record.value for record in found] == RECORDS
    if title == "JSON objects over several lines" or not title.endswith("Lines") or b"\r\n\r\n" not in content:
        assert [(record.place.source.name, record.place.record) for record in found] == [
            (str(path), n) for n in (1, 2, 3)
        ]


VALUES = st.dictionaries(
    st.sampled_from(("a", "b")),
    st.sampled_from((None, True, -1.5e3, "", 'é\\"]},\n', [1, [2]], {"c": {}}, "x" * 50)),
    max_size=2,
) | st.sampled_from((12345678901, "a", True, None, -1.25))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    st.lists(VALUES, max_size=6), st.sampled_from((None, 0, 3)), st.sampled_from((1, 2, 7, 64, 1 << 16)), st.booleans()
)
def test_values_are_read_one_by_one_wherever_the_file_is_cut(
    tmp_path: Path, values: list[Any], indent: int | None, chunk: int, in_array: bool
) -> None:
    path = tmp_path / "a.json"
    parts = [json.dumps(one, indent=indent, ensure_ascii=False) for one in values]
    path.write_text(f"[{' ,'.join(parts)}\n]\n" if in_array else "\n".join(parts), "utf-8")
    with pytest.MonkeyPatch.context() as patch, path.open("rb") as file:
        patch.setattr(containers, "_CHUNK", chunk)
        assert [record.value for record in containers._value_records(path, file)] == values


CUT = json.dumps(RECORDS).encode()
BROKEN: list[tuple[str, bytes, str]] = [
    ("a.json", CUT[:-1], "the array is cut off"),
    ("a.json", CUT[:-10], "the file is cut off"),
    ("a.json", b'[{"a": 1},]', "a trailing comma at the end"),
    ("a.json", b'[{"a": 1} {"a": 2}]', "not valid JSON: no comma after the row"),
    ("a.json", b'[{"a": 1}] x', "text follows the array"),
    ("a.json", b'[{"a": 1,}]', "not valid JSON: a trailing comma"),
    ("a.json", b"[{'a': 1}]", "single quotes"),
    ("a.json", b'[{"a": None}]', "a constant of Python"),
    ("a.json", b"[" * 100_000, "JSON is nested too deeply"),
    ("a.json", b'[{"a": "\xff"}]', "not valid utf-8"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:-200], "the compressed data is damaged"),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS))[:40] + b"x" * 99, "the compressed data is damaged"),
    ("a.jsonl.gz", b"\x1f\x8bno gzip at all", "the compressed data is damaged"),
    ("a.jsonl.xz", lzma.compress(lines(RECORDS)), "this is xz; expected gzip, or no compression. Unpack it: xz -dc "),
    ("a.jsonl.zst", bytes(pa.Codec("zstd").compress(lines(RECORDS))), "this is zstd; "),
    ("a.jsonl.bz2", bz2.compress(lines(RECORDS)), "this is bzip2; "),
    ("a.jsonl.gz", gzip.compress(lines(RECORDS).decode().encode("utf-16")), "this is gzip of UTF-16. Unpack it: "),
    ("a.jsonl", lines(RECORDS).decode().encode("utf-16")[:-1], "not valid utf-16"),
    ("a.parquet", b"PAR1nonsensePAR1", "cannot be read as Parquet"),
    ("a.arrow", b"ARROW1nonsense", "cannot be read as an Arrow file"),
    ("a.arrow", b"\xff\xff\xff\xff\x00\x01\x00\x00nonsense", "cannot be read as an Arrow stream"),
    ("a.csv", b'a,b\n"x,y\n', "not valid CSV: unexpected end of data"),
    ("a.csv", b"a,a\n1,2\n", "two columns have one name: a"),
    ("a.tar.gz", gzip.compress(b"PAR1xxxxPAR1"), "this is gzip of Parquet"),
    ("a.gz", gzip.compress(gzip.compress(b"{}")), "this is gzip of gzip"),
]


@pytest.mark.parametrize(("name", "content", "said"), BROKEN, ids=[f"{form[0]}-{form[2][:40]}" for form in BROKEN])
def test_a_broken_container_is_an_input_error(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.sampled_from(FORMS), st.data())
def test_damage_is_an_error_or_other_records_never_a_crash(tmp_path: Path, form: Any, data: st.DataObject) -> None:
    name, content, _ = form
    path = tmp_path / name
    if callable(content):
        content(path)
        content = path.read_bytes()
    at = data.draw(st.integers(0, len(content) - 1))
    with_damage = bytearray(content)
    with_damage[at] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(with_damage[: data.draw(st.sampled_from((len(content), at)))]))
    with suppress(InputError):
        read(path)


def test_a_bad_line_or_element_is_an_error_among_the_others(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": NaN}\n{"b": 1, "b": 2}\n\xff\n{"a": 2}\n')
    found = read(path)
    errors = [one for one in found if isinstance(one, RowError)]
    assert [str(error.place) for error in errors] == [f"{path}:{line}" for line in (2, 3, 4)]
    said = ("NaN", "'b' appears twice", f"iconv -f latin1 -t utf-8 {path} > utf8-a.jsonl")
    assert [value in str(error) for error, value in zip(errors, said, strict=True)] == [True] * 3
    assert "byte 1" in errors[2].found
    array = tmp_path / "a.json"
    array.write_bytes(b'[{"a": 1}, {"a": NaN}, {"b": 1, "b": 2}, {"a": 2}]')
    found = read(array)
    assert [isinstance(one, RowError) for one in found] == [False, True, True, False]
    assert found[-1] == {"a": 2}
    rows = tmp_path / "a.csv"
    rows.write_bytes(b"a,b\n1,2\n\n1\n1,2,3\n3,4\n")
    first, short, long, last = read(rows)
    assert (first["a"], last["a"]) == ("1", "3")
    assert [str(one.place) for one in (short, long)] == [f"{rows} record 2, line 4", f"{rows} record 3, line 5"]
    assert [one.found for one in (short, long)] == ["1 fields; the header has 2", "3 fields; the header has 2"]


def test_a_dataset_that_was_saved_to_disk_is_read_in_the_order_of_its_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(RECORDS * 3).save_to_disk(tmp_path / "one", num_shards=3)
    files = source_files(tmp_path / "one")
    assert len(files) == 3
    assert [value for file in files for value in read(file)] == RECORDS * 3
    splits = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(RECORDS), "test": datasets.Dataset.from_list([])}
    )
    splits.save_to_disk(tmp_path / "two")
    with pytest.raises(InputError, match="has 2 splits: train, test"):
        source_files(tmp_path / "two")
    assert [value for file in source_files(tmp_path / "two" / "train") for value in read(file)] == RECORDS


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("state.json", "[]", "no list under '_data_files'"),
        ("state.json", '{"_data_files": [{"filename": "../x.arrow"}]}', "leads out of the folder"),
        ("state.json", '{"_data_files": ["x.arrow", 3]}', "no such file"),
        ("dataset_dict.json", '{"splits": "train"}', "no list under 'splits'"),
        ("dataset_dict.json", '{"splits": ["../secret"]}', "no such file or folder"),
        ("dataset_dict.json", "{", "not valid JSON"),
    ],
)
def test_a_damaged_folder_is_an_input_error(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / "x.arrow").touch()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text(text, "utf-8")
    with pytest.raises(InputError) as caught:
        source_files(folder)
    assert said in str(caught.value)


def test_a_folder_is_its_one_data_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no data files"):
        source_files(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_bytes(lines(RECORDS))
    (tmp_path / "README.md").write_text("x", "utf-8")
    assert source_files(tmp_path) == [tmp_path / "data" / "a.jsonl"]
    (tmp_path / "data" / "b.jsonl.gz").write_bytes(gzip.compress(lines(RECORDS)))
    with pytest.raises(InputError, match=r"has 2 data files: data/a.jsonl, data/b.jsonl.gz"):
        source_files(tmp_path)


@pytest.mark.parametrize(
    "form",
    ["lines", pytest.param("array", marks=pytest.mark.slow), pytest.param("gzip", marks=pytest.mark.slow), "parquet"],
)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, form: str) -> None:
    def peak(count: int) -> int:
        records = ({"instruction": str(number), "output": "x" * 1000} for number in range(count))
        path = tmp_path / f"{count}.{form}"
        if form == "parquet":
            parquet.write_table(pa.Table.from_pylist(list(records)), path, row_group_size=250)
        elif form == "array":
            path.write_bytes(json.dumps(list(records)).encode())
        else:
            data = lines(records)
            path.write_bytes(gzip.compress(data, 1) if form == "gzip" else data)
        tracemalloc.start()
        for record in open_source(path).records(lambda read: None):
            assert not isinstance(record.value, RowError)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(8000) < 1.5 * peak(1000) + 200_000
