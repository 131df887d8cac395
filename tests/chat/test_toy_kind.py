"""A kind of record that a test brings along is read, encoded, shown and imported: no file of the package knows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from each_oracle import oracle_named
from toy_kind import POEM

from pytest_mistral_lora.chat.encoded import IGNORE_INDEX
from pytest_mistral_lora.chat.kinds.conversation import CONVERSATION
from pytest_mistral_lora.chat.kinds.records import parse_rows, parse_trained, record_kind
from pytest_mistral_lora.chat.kinds.registry import KINDS, register_kinds
from pytest_mistral_lora.chat.row_files import scan_records
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.chat.templates.chat_template import ChatTemplate
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.cli import main
from pytest_mistral_lora.errors import RowError
from pytest_mistral_lora.serving.server import chat_request

LINES = ["Two roads diverged", "in a yellow wood"]
RECORD = {"poem": LINES, "author": "Frost"}


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    register_kinds([POEM.importable])
    yield
    del KINDS[POEM.name]


def written(folder: Path, *records: Any) -> Path:
    path = folder / "poems.jsonl"
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def test_a_kind_is_unknown_until_it_is_registered():
    del KINDS[POEM.name]
    assert record_kind(RECORD) is CONVERSATION
    register_kinds([POEM.importable, POEM.importable])
    assert record_kind(RECORD) is POEM


def test_its_records_are_read_with_their_places(tmp_path):
    path = written(tmp_path, RECORD, {"poem": ["", 3]}, {"poem": []})
    good, number, empty = scan_records(path)
    [row] = good
    assert (row.kind, row.to_json(), str(row.place)) == (POEM, {"poem": LINES}, f"{path}:1")
    assert (str(number.place), number.found) == (f"{path}:2, poem[1]", "is a number")
    assert (str(empty.place), empty.found) == (f"{path}:3, poem", "is empty")


def test_it_is_encoded_and_trained_on():
    oracle = oracle_named("spm-v3")
    row = parse_trained(RECORD)
    encoded = oracle.encode(row)
    ids = oracle.encode_text("\n".join(LINES))
    assert encoded.input_ids == (oracle.bos_id, *ids, oracle.eos_id)
    assert encoded.labels == (IGNORE_INDEX, *ids, oracle.eos_id)
    assert oracle.encode(RECORD) == encoded
    assert oracle.encode_prompt(row) == (oracle.bos_id,)
    assert [span.kind for span in encoded.spans] == ["control", "text", "eos"]


@pytest.mark.parametrize("take", [chat_request, lambda row: template().encode(row)])
def test_what_takes_conversations_alone_refuses_it(take: Callable[[Row], Any]):
    [row] = parse_rows(RECORD)
    with pytest.raises(RowError, match="a poem"):
        take(row)


def template() -> ChatTemplate:
    return CheckpointTokenizer(oracle_named("spm-v3").path).template


def test_its_tokens_are_shown(tmp_path, capsys):
    path = written(tmp_path, RECORD)
    page = tmp_path / "tokens.html"
    assert main(["render", str(path), "--tokenizer", "spm-v3", "--json"]) == 0
    [shown] = map(json.loads, capsys.readouterr().out.splitlines())
    encoded = oracle_named("spm-v3").encode(RECORD)
    assert shown == {"poem": LINES, "input_ids": [*encoded.input_ids], "labels": [*encoded.labels]}
    assert main(["render", str(path), "--tokenizer", "spm-v3", "--html", str(page)]) == 0
    assert "diver" in page.read_text(encoding="utf-8")


def test_it_is_imported_as_it_is(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    assert main(["import", str(written(tmp_path, RECORD)), "--to", str(rows)]) == 0
    assert [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] == [RECORD]
    assert "a poem (`poem`)" in capsys.readouterr().out
