"""Rows that are written for other trainers, and by them, come back as the same rows."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from imported import imported, written
from pyarrow import parquet

from pytest_mistral_lora.chat.kinds.conversation import parse_row
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.formats.convert import Source, convert
from pytest_mistral_lora.formats.report import Report
from pytest_mistral_lora.formats.sources import rows_of
from pytest_mistral_lora.strategies import rows
from pytest_mistral_lora.training.export.bridge import encoded_lines, message_lines
from pytest_mistral_lora.training.rows.loading import Split

FOLDER = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
FEW = settings(FOLDER, max_examples=5)


@FOLDER
@given(st.lists(rows(system=None), min_size=1, max_size=3))
def test_the_messages_of_an_export_come_back(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    split = Split([parse_row(row) for row in data], [])
    assert imported(written(tmp_path / "rows.jsonl", *message_lines(split))) == data


@FOLDER
@given(
    st.lists(rows(tools=None, weights=True, alternating=False, parallel=True, thinking=True), min_size=1, max_size=3)
)
def test_the_chat_rows_of_an_export_come_back(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(f"{parse_row(row).to_jsonl()}\n" for row in data), "utf-8")
    assert list(map(parse_row, imported(path))) == list(map(parse_row, data))


def test_the_tokens_of_an_export_are_named(tmp_path: Path) -> None:
    oracle = Oracle(shipped_tokenizer("spm-v3"))
    row = Row(({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}))
    path = written(tmp_path / "train.jsonl", *encoded_lines(Split([row], [oracle.encode(row)])))
    with pytest.raises(InputError, match=r"encoded rows \(input_ids\).* mistral-lora check"):
        list(convert([Source(path)], Report()))


def as_lines(path: Path, data: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in data).encode()))


def as_array(path: Path, data: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(data, ensure_ascii=False, indent=1), "utf-8-sig")


def as_table(path: Path, data: list[dict[str, Any]]) -> None:
    # columns of JSON text, as tables hold rows whose messages have other keys in each
    texts = [{key: json.dumps(value, ensure_ascii=False) for key, value in row.items()} for row in data]
    columns = sorted({key for row in texts for key in row})
    parquet.write_table(pa.table({key: [row.get(key) for row in texts] for key in columns}), path)


def as_csv(path: Path, data: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sorted({key for row in data for key in row}))
        writer.writeheader()
        writer.writerows({key: json.dumps(value) for key, value in row.items()} for row in data)


def as_shards(path: Path, data: list[dict[str, Any]]) -> None:
    for number, row in enumerate(data):
        written(path / f"part-{number:05}-of-{len(data):05}.jsonl", row)


CONTAINERS = {"a.jsonl.gz": as_lines, "a.json": as_array, "a.parquet": as_table, "a.csv": as_csv, "a": as_shards}


@FEW
@pytest.mark.parametrize("name", CONTAINERS)
@given(data=st.lists(rows(tools=None, weights=True, alternating=False, parallel=True), min_size=1, max_size=3))
def test_rows_come_back_from_every_container(tmp_path: Path, name: str, data: list[dict[str, Any]]) -> None:
    path = tmp_path / name
    if path.is_dir():
        shutil.rmtree(path)
    if "." not in name:
        path.mkdir()
    CONTAINERS[name](path, data)
    assert list(rows_of(path)) == list(map(parse_row, data))


@FOLDER
@given(data=st.lists(rows(system=None, tools=None), min_size=1, max_size=2))
def test_the_prompts_and_completions_of_trl_come_back(tmp_path: Path, data: list[dict[str, Any]]) -> None:
    records, expected = [], []
    for row in data:
        last = max(index for index, one in enumerate(row["messages"]) if one["role"] == "assistant")
        prompt, completion = row["messages"][:last], row["messages"][last : last + 1]
        tools = {"tools": json.dumps(row["tools"])} if "tools" in row else {}
        records.append({"prompt": prompt, "completion": completion, **tools})
        before = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in prompt]
        expected.append(parse_row({**row, "messages": [*before, *completion]}))
    assert list(rows_of(written(tmp_path / "trl.jsonl", *records))) == expected
