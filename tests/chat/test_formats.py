from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.reading import scan_jsonl
from pytest_mistral_lora.chat.reading.chunks import DataFile, chunks
from pytest_mistral_lora.chat.row_files import read_rows, scan_rows
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import InputError, OracleRejection, RowError, RowsError
from pytest_mistral_lora.formats.recognition import FORMATS, recognise
from pytest_mistral_lora.places import Place
from pytest_mistral_lora.strategies import rows

ROW = {"messages": [{"role": "user", "content": "hé"}, {"role": "assistant", "content": "a"}]}
LINE = json.dumps(ROW, ensure_ascii=False).encode() + b"\n"
TEXT = LINE.decode()


def parquet(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet as pq

    pq.write_table(pa.Table.from_pylist([ROW]), path)


def arrow(path: Path, *, stream: bool) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist([ROW])
    open_file = pa.ipc.new_stream if stream else pa.ipc.new_file
    with path.open("wb") as file, open_file(file, table.schema) as writer:
        writer.write_table(table)


def zstd(data: bytes) -> bytes:
    import pyarrow as pa

    return bytes(pa.Codec("zstd").compress(data))


CONTAINERS: list[tuple[str, Any, str]] = [
    ("rows.jsonl.gz", gzip.compress(LINE), "gzip"),
    ("rows.jsonl", gzip.compress(LINE), "gzip"),  # the bytes decide, not the name
    ("rows.jsonl.zst", zstd(LINE), "zstd"),
    ("rows.jsonl.bz2", bz2.compress(LINE), "bzip2"),
    ("rows.jsonl.xz", lzma.compress(LINE), "xz"),
    ("rows.jsonl", TEXT.encode("utf-16"), "UTF-16"),
    ("rows.jsonl", TEXT.encode("utf-16-be"), "UTF-16-BE"),
    ("rows.jsonl", TEXT.encode("utf-16-le"), "UTF-16-LE"),
    ("rows.jsonl", TEXT.encode("utf-32"), "UTF-32"),
    ("rows.json", json.dumps([ROW, ROW]).encode(), "a JSON array"),
    ("rows.json", json.dumps([ROW, ROW], indent=2).encode(), "a JSON array"),
    ("rows.json", json.dumps(ROW, indent=2).encode(), "JSON objects over several lines"),
    ("rows.parquet", parquet, "Parquet"),
    ("rows.arrow", lambda path: arrow(path, stream=True), "an Arrow stream"),
    ("rows.arrow", lambda path: arrow(path, stream=False), "an Arrow file"),
    ("rows.csv", b"prompt,completion\na,b\n", "CSV"),
    ("rows.tsv", b"prompt\tcompletion\na\tb\n", "TSV"),
    ("rows.zip", b"PK\x03\x04rest", "a zip archive"),
    (
        "rows.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "a pointer of Git LFS, not the data",
    ),
    ("rows.jsonl", b"<!DOCTYPE html><html>", "a web page, not the data"),
    ("rows.pkl", b"\x80\x04\x95abc", "a Python pickle, which can run code"),
]


@pytest.mark.parametrize(("name", "content", "title"), CONTAINERS, ids=[f"{c[0]}-{c[2][:12]}" for c in CONTAINERS])
def test_every_reader_names_another_container(tmp_path: Path, name: str, content: Any, title: str) -> None:
    path = tmp_path / name
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    found: list[str] = []
    for read in (lambda: list(read_rows(path)), lambda: list(scan_rows(path)), lambda: list(scan_jsonl(path))):
        with pytest.raises(InputError) as caught:
            read()
        found.append(str(caught.value))
    refused: list[InputError] = []
    assert list(chunks([DataFile(path, False)], refused.append)) == []
    found += map(str, refused)
    assert len(found) == 4
    assert all(text.startswith(f"{path}: this is {title};") for text in found), found
    assert all(
        ("Unpack it: " in text) == (title in ("zstd", "bzip2", "xz")) for text in found if title != "a zip archive"
    )


FORMS: list[tuple[Any, str, str]] = [
    ({"conversations": [{"from": "human", "value": "a"}]}, "sharegpt", "ShareGPT (`conversations` with from/value)"),
    ({"conversations": [{"role": "user", "content": "a"}]}, "sharegpt", "ShareGPT (`conversations` with role/content)"),
    ({"messages": [{"from": "human", "value": "a"}]}, "sharegpt", "ShareGPT (`messages` with from/value)"),
    ({"instruction": "a", "input": "", "output": "b"}, "alpaca", "Alpaca (`instruction/input/output`)"),
    ({"instruction": "a", "response": "b"}, "alpaca", "Alpaca (`instruction/response`)"),
    (
        {"prompt": "a", "completion": "b"},
        "prompt-completion",
        "prompt and completion (`prompt` and `completion` of text)",
    ),
    (
        {"prompt": [{"role": "user", "content": "a"}], "completion": []},
        "prompt-completion",
        "prompt and completion (`prompt` and `completion` of messages)",
    ),
    ({"question": "a", "answer": "b"}, "prompt-completion", "prompt and completion (`question` and `answer` of text)"),
    ({"chosen": "a", "rejected": "b"}, "preference", "preference pairs (`chosen` and `rejected`)"),
    (
        {"input": {}, "preferred_output": [], "non_preferred_output": []},
        "preference",
        "preference pairs (`preferred_output` and `non_preferred_output`)",
    ),
    ({"interactions": [{"role": "user", "text": "a"}]}, "messages", "chat messages (`interactions` with role/text)"),
    ([{"role": "user", "content": "a"}], "messages", "chat messages (a list of messages with role/content)"),
    ({"input_ids": [1], "labels": [1]}, "", "encoded rows (input_ids)"),
    ({"text": "a"}, "", "plain text (text)"),
    ({"segments": []}, "", "a text in segments that are trained on or not (segments)"),
]


@pytest.mark.parametrize(("record", "name", "title"), FORMS, ids=[form[2] for form in FORMS])
def test_a_record_of_another_format_is_named(record: Any, name: str, title: str, tmp_path: Path) -> None:
    recognised = recognise(record)
    assert recognised is not None
    assert (recognised.name, recognised.title) == (name, title)
    with pytest.raises(RowError) as caught:
        parse_row(record, place=Place.of("data/my rows.jsonl", 3))
    assert caught.value.found == f"this is {title}"
    step = (
        recognised.advice.replace("FILE", "'data/my rows.jsonl'")
        or "Convert it: mistral-lora import 'data/my rows.jsonl' --to rows.jsonl"
    )
    assert caught.value.next_step == step
    # a fault that all rows of a file have is shown once
    path = tmp_path / "rows.jsonl"
    path.write_text(3 * (json.dumps(record) + "\n") if isinstance(record, dict) else "\n", "utf-8")
    with pytest.raises(RowsError) as caught_all:
        list(read_rows(path))
    assert str(caught_all.value).count("this is") == isinstance(record, dict)


@pytest.mark.parametrize("record", [None, 1, "x", [], [1], {}, {"a": 1}, {"conversations": "x"}, {"messages": None}])
def test_a_record_without_a_known_structure_is_none(record: Any) -> None:
    assert recognise(record) is None


@given(rows(tools=None, alternating=False, thinking=True))
def test_a_row_is_recognised_as_messages(row: dict[str, Any]) -> None:
    recognised = recognise(row)
    assert recognised is not None
    assert recognised.name == "messages"
    assert recognised.name in FORMATS


CONVERT = "mistral-lora import 'my rows.jsonl' --to rows.jsonl"


@pytest.mark.parametrize(
    ("message", "step"),
    [
        ({"role": "developer", "content": "a"}, f"To make it 'system': {CONVERT}"),
        ({"role": "gpt", "content": "a"}, f"To make it 'assistant': {CONVERT}"),
        ({"role": "bot", "content": "a"}, "Did you mean 'assistant'?"),
        ({"role": ["user"], "content": "a"}, ""),
        ({"role": "assistant", "content": "a", "train": False}, f"To turn it into `weight`: {CONVERT}"),
        ({"role": "assistant", "content": "a", "mask": True}, f"To turn it into `weight`: {CONVERT}"),
        (
            {"role": "assistant", "content": "a", "reasoning_content": "b"},
            f"To turn it into a thinking chunk: {CONVERT}",
        ),
        (
            {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
            f"To turn it into `tool_calls`: {CONVERT}",
        ),
        (
            {"role": "assistant", "content": [{"type": "thinking", "thinking": [{"type": "text", "text": "b"}]}]},
            f"To join its texts: {CONVERT}",
        ),
        ({"role": "assistant", "refusal": "no"}, f"To turn it into `content`: {CONVERT}"),
        (
            {"role": "user", "content": "a", "images": ["b.png"]},
            f"To leave it out: {CONVERT} --lossy media",
        ),
        (
            {"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "x"}}]},
            f"To leave it out: {CONVERT} --lossy media",
        ),
        ({"role": "user", "content": "a", "name": "Ann"}, f"To leave it out: {CONVERT} --lossy names"),
        ({"role": "user", "content": "a", "size": 1}, f"To leave it out: {CONVERT} --lossy message-keys"),
        # misspelt: to leave it out would lose it
        ({"role": "user", "contents": "a"}, ""),
        ({"role": "assistant", "content": "a", "wieght": 0}, ""),
    ],
)
def test_a_field_of_another_format_names_its_remedy(message: Any, step: str, tmp_path: Path) -> None:
    row = {"messages": [message, {"role": "assistant", "content": "a"}]}
    with pytest.raises(RowError) as caught:
        parse_row(row, place=Place.of("my rows.jsonl", 3))
    assert caught.value.next_step.endswith(step) if step else not caught.value.next_step
    if CONVERT in step:
        # the command does as it promises
        source, to = tmp_path / "source.jsonl", tmp_path / "rows.jsonl"
        asked = {"role": "user", "content": "q"}
        kept = [message] if message["role"] in ("user", "developer") else [asked, message]
        turns = [*kept, *([asked] if message["role"] == "developer" else []), {"role": "assistant", "content": "a"}]
        source.write_text(json.dumps({"messages": turns}))
        options = step.partition(" --to rows.jsonl")[2].split()
        assert main(["import", str(source), "--to", str(to), *options]) == 0
        assert len(list(read_rows(to))) == 1


def test_ids_of_calls_and_tools_as_text_name_the_import() -> None:
    call = {"id": "call_abc", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "call_abc"},
        {"role": "assistant", "content": "b"},
    ]
    with pytest.raises(OracleRejection) as rejected:
        Oracle(shipped_tokenizer("spm-v3")).encode(parse_row({"messages": turns}, place=Place.of("my rows.jsonl", 3)))
    assert str(rejected.value.place) == "my rows.jsonl:3, messages[1].tool_calls[0].id"
    assert rejected.value.next_step == f"To give each call such an id: {CONVERT}"
    with pytest.raises(RowError) as caught:
        parse_row({"messages": turns, "tools": "[]"}, place=Place.of("my rows.jsonl", 3))
    assert caught.value.next_step == f"To read its JSON: {CONVERT}"


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"a": 1,}', "a trailing comma"),
        ('{"a": [1, ]}', "a trailing comma"),
        ('{"a": 1},', "a comma behind the object"),
        ('{"a": 1}{"a": 2}', "a second value on the line"),
        ("{'a': 1}", "single quotes"),
        ('{"a": True}', "a constant of Python"),
        ('{"a": None}', "a constant of Python"),
    ],
)
def test_a_common_fault_of_json_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line, "utf-8")
    errors = [item for item in scan_jsonl(path) if isinstance(item, RowError)]
    assert len(errors) == 1
    assert errors[0].found.startswith(f"not valid JSON: {fault}")


@pytest.mark.parametrize("text", ["", "\n", "\ufeff", " \n\n"])
def test_a_file_without_rows_is_an_error_of_every_reader(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, "utf-8")
    assert [str(item) for item in scan_rows(path)] == [f"{path}: the file has no rows"]
    with pytest.raises(RowsError, match="the file has no rows"):
        list(read_rows(path))
