"""Damaged and hostile containers of rows end in rows or in an error of ours, within bounds of time and memory."""

from __future__ import annotations

import csv
import functools
import gzip
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fuzzing import MakeCampaign
from pyarrow import parquet

TURNS = [{"role": "user", "content": "Café 😀"}, {"role": "assistant", "content": "b" * 40, "weight": 1}]
RECORDS: list[dict[str, Any]] = [{"messages": TURNS, "id": n, "tags": ["x", None, "y" * n]} for n in range(40)]
PAIRS = [{"instruction": f"question {n}", "output": 'answer, "quoted"\n' * (n % 4 + 1)} for n in range(40)]
Make = Callable[[], tuple[str, bytes]]


def jsonl(records: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def table(rng: random.Random) -> pa.Table:
    """A sound table with columns of many types beside the messages."""
    count = len(RECORDS)
    more: dict[str, Any] = {
        "words": pa.array(["a", "bc", None, "d"] * (count // 4)).dictionary_encode(),
        "large": pa.array(["x" * n for n in range(count)], pa.large_string()),
        "views": pa.array(["a long text of a view " + str(n) for n in range(count)], pa.string_view()),
        "nothing": pa.nulls(count),
        "map": pa.array([[("a", n), ("a", 2)] for n in range(count)], pa.map_(pa.string(), pa.int64())),
        "fixed": pa.array([[n, None] for n in range(count)], pa.list_(pa.int32(), 2)),
        "list": pa.array([[1.5] * (n % 3) for n in range(count)], pa.large_list(pa.float32())),
        "list view": pa.array([["a"] * (n % 3) for n in range(count)], pa.list_view(pa.string())),
        "time": pa.array([n * 10**12 for n in range(count)], pa.timestamp("us", "UTC")),
        "nanoseconds": pa.array(range(count), pa.timestamp("ns")),
        "decimal": pa.array(range(count), pa.decimal128(20, 2)),
        "bytes": pa.array([b"\xff" * n for n in range(count)]),
        "runs": pa.RunEndEncodedArray.from_arrays(pa.array([count // 2, count], pa.int32()), pa.array(["a", "b"])),
        "deep": pa.array([functools.reduce(lambda inner, _: [inner], range(20), n) for n in range(count)]),
    }
    chosen = rng.sample(sorted(more), rng.randint(0, 3))
    found = pa.Table.from_pylist(RECORDS)
    for name in chosen:
        found = found.append_column(name, more[name])
    return found


def arrow(rng: random.Random) -> tuple[str, bytes]:
    file = io.BytesIO()
    found = table(rng)
    opened = rng.choice([pa.ipc.new_stream, pa.ipc.new_file])
    options = pa.ipc.IpcWriteOptions(compression=rng.choice([None, None, "lz4", "zstd"]))
    with opened(file, found.schema, options=options) as writer:
        writer.write_table(found, max_chunksize=rng.choice([7, 1000]))
    return "a.arrow", file.getvalue()


def parquet_file(rng: random.Random) -> tuple[str, bytes]:
    file, found = io.BytesIO(), table(rng)
    kept = [name for name in found.column_names if name not in ("runs", "list view", "views")]
    codec = rng.choice(["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
    options: dict[str, Any] = {"compression": codec, "use_dictionary": rng.random() < 0.5}
    options |= {"data_page_version": rng.choice(["1.0", "2.0"]), "data_page_size": rng.choice([64, 1 << 20])}
    options |= {"row_group_size": rng.choice([7, 1000]), "write_page_index": rng.random() < 0.3}
    parquet.write_table(found.select(kept), file, **options)
    return "a.parquet", file.getvalue()


def text(rng: random.Random) -> tuple[str, bytes]:
    """A sound file of lines, an array, values over lines, or CSV; perhaps in another encoding, perhaps compressed."""
    name, data = rng.choice(
        [
            ("a.jsonl", jsonl(RECORDS)),
            ("a.json", json.dumps(RECORDS, indent=rng.choice([None, 2]), ensure_ascii=False).encode()),
            ("a.json", "\n".join(json.dumps(record, indent=1) for record in RECORDS).encode()),
            ("a.csv", comma_separated(",")),
            ("a.tsv", comma_separated("\t")),
        ]
    )
    other = data.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32"]))
    return rng.choice([(name, data), (name, other), (f"{name}.gz", gzip.compress(data))])


def comma_separated(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(PAIRS[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(PAIRS)
    return file.getvalue().encode()


NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**62, 2**63, 2**64 - 1)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four faults: bits, cuts, copies, lengths, and long runs of one byte."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(len(found) or 1)
        kind = rng.choice(["bit", "byte", "length", "length", "cut", "copy", "remove", "run", "tail"])
        if kind == "bit" and found:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == "byte" and found:
            found[at] = rng.randrange(256)
        elif kind == "length":
            width = rng.choice("HIQ")
            at -= at % struct.calcsize(width)
            number = rng.choice(NUMBERS) & (256 ** struct.calcsize(width) - 1)
            found[at : at + struct.calcsize(width)] = struct.pack(f"<{width}", number)
        elif kind == "cut":
            del found[at:]
        elif kind == "copy":
            size = rng.randrange(1, 200)
            found[at:at] = found[at : at + size] * rng.choice([1, 1, 3, 500])
        elif kind == "remove":
            del found[at : at + rng.randrange(1, 100)]
        elif kind == "run":
            found[at:at] = rng.choice([b"\0", b"[", b'{"a":', b"x", b"\xff", b'"', b",", b" ", b"9"]) * rng.choice(
                [10, 70_000]
            )
        else:
            # the footers of tables are at the end
            at = max(0, len(found) - rng.randrange(1, 300))
            found[at : at + 4] = struct.pack("<I", rng.choice(NUMBERS) & 0xFFFFFFFF)
    return bytes(found)


def repeated(text: bytes, count: int) -> bytes:
    """A gzip file of many megabytes of the same, made of members of one."""
    return gzip.compress(text * (1_000_000 // len(text))) * count


def bomb(rng: random.Random) -> tuple[str, bytes]:
    """A small file that stands for a very large one."""
    return rng.choice([dictionary_text, many_nulls, many_rows, wide_table, long_name, packed_text, long_row])(rng)


def dictionary_text(rng: random.Random) -> tuple[str, bytes]:
    size, count = rng.choice([(50_000_000, 2000), (1_000_000, 20_000), (15_000_000, 300)])
    words = pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array(["x" * size]))
    return written(pa.table({"instruction": words, "output": ["a"] * count}), rng)


def many_nulls(rng: random.Random) -> tuple[str, bytes]:
    count = rng.choice([500_000_000, 2_000_000])
    kind = rng.choice(["null", "struct", "fixed"])
    inner = pa.nulls(count)
    if kind == "struct":
        inner = pa.StructArray.from_arrays([inner], ["x" * 100])
    elif kind == "fixed":
        inner = pa.FixedSizeListArray.from_arrays(pa.nulls(count), 1000)
        count //= 1000
    lists = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), inner)
    return written(pa.table({"messages": lists}), rng, "stream")


def many_rows(rng: random.Random) -> tuple[str, bytes]:
    return written(pa.table({"messages": pa.nulls(rng.choice([3_000_000, 2_000_000_000]))}), rng, "stream")


def wide_table(rng: random.Random) -> tuple[str, bytes]:
    count = rng.choice([2_000, 50_000])
    return written(pa.table([pa.array(["a"])] * count, names=[f"c{n}" for n in range(count)]), rng)


def long_name(rng: random.Random) -> tuple[str, bytes]:
    return written(pa.table({"n" * rng.choice([100_000, 10_000_000]): ["a"] * 300, "messages": [TURNS] * 300}), rng)


def packed_text(rng: random.Random) -> tuple[str, bytes]:
    form = rng.choice([b"a", b" ", b"\n", b"[", b'"', b",", b'{"messages": []}\n'])
    start = rng.choice([b"", b'[{"messages": "', b'{"messages": "', b"instruction,output\n", b'instruction,output\n"'])
    name = rng.choice(["a.jsonl", "a.json", "a.csv"])
    packed = gzip.compress(form * (2_000_000 // len(form))) * rng.choice([20, 150])
    return f"{name}.gz", gzip.compress(start) + packed


def long_row(rng: random.Random) -> tuple[str, bytes]:
    size = rng.choice([18_000_000, 20_900_000, 30_000_000])
    inner = rng.choice([b"{}", b"[]", b"null", b'{"a":0}', b"1"])
    row = b'{"messages": [' + b",".join([inner] * (size // (len(inner) + 1))) + b"]}"
    return ("a.json", b"[" + row + b"]") if rng.random() < 0.5 else ("a.jsonl", row + b"\n")


def written(found: pa.Table, rng: random.Random, form: str = "") -> tuple[str, bytes]:
    file = io.BytesIO()
    if (form or rng.choice(["parquet", "stream"])) == "parquet":
        parquet.write_table(found, file, compression="zstd")
        return "a.parquet", file.getvalue()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(file, found.schema, options=options) as writer:
        writer.write_table(found)
    return "a.arrow", file.getvalue()


def case(seed: int) -> tuple[str, bytes]:
    """The file of a seed."""
    rng = random.Random(seed)
    if seed % 20 == 19:
        return bomb(rng)
    name, data = [arrow, parquet_file, text][seed % 3](rng)
    return name, damaged(data, rng)


def test_a_hostile_container_is_rows_or_an_error(campaign: MakeCampaign, tmp_path: Path) -> None:
    containers = campaign("containers", 20)
    for seed in containers.seeds():
        name, data = case(seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / name).write_bytes(data)
        words: list[str] = ["import", name, "--to", "rows.jsonl"]
        if seed % 4 == 1:
            # bad records are left out, so that each of them is read
            words += ["--lossy", "bad-records", "--lossy", "keys", "--format", "messages"]
        elif seed % 12 == 6:
            words = ["check" if seed % 24 == 6 else "stats", name, "--tokenizer", "spm-v3"]
        found = containers.verb(seed, words, folder, input_bytes=len(data))
        assert words[0] != "import" or (found.code == 0) is (folder / "rows.jsonl").is_file(), seed
        (folder / name).unlink()
        (folder / "rows.jsonl").unlink(missing_ok=True)
        folder.rmdir()


@pytest.mark.parametrize("make", [arrow, parquet_file, text])
def test_the_files_that_are_damaged_are_sound(make: Callable[[random.Random], Any], tmp_path: Path) -> None:
    from pytest_mistral_lora.formats.containers import open_source

    for seed in range(8):
        name, data = make(random.Random(seed))
        (tmp_path / name).write_bytes(data)
        if b"run_end" in data or "csv" in name or "tsv" in name:
            continue
        found = [record.value for record in open_source(tmp_path / name).records(lambda read: None)]
        assert [record["messages"][1]["content"] for record in found] == ["b" * 40] * len(RECORDS)
