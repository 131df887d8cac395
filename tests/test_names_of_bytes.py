"""Names of files and folders that are not UTF-8: what they hold is judged like any other."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest
from cut_sentencepiece import cut_v3
from pyarrow import parquet

from pytest_mistral_lora import audit, judge
from pytest_mistral_lora.chat.oracle import shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base
from pytest_mistral_lora.cli import main

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
BAD = {"messages": [{"role": "usr", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
ENCODED = ROW | {"input_ids": [1, 3, 16127, 4, 23325, 2], "labels": [-100] * 4 + [23325, 2]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path(os.fsdecode(b"caf\xe9"))
    try:
        path.mkdir()
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    return path


def write(path: Path, rows: list[dict[str, object]]) -> None:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        with path.open("wb") as file:
            parquet.write_table(pa.Table.from_pylist(rows), file)
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with path.open("wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text(text)


def test_a_command_that_cannot_be_copied_is_not_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for name in ("rows.jsonl", os.fsdecode(b"rows\xff.jsonl"), "rows\u202e.jsonl"):
        write(Path(name), [ROW])
        assert main(["check", name, "--tokenizer", "spm-v3"]) == 0
        shown[name] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next: ")]
    assert [len(lines) for lines in shown.values()] == [1, 0, 0]


@pytest.mark.parametrize("end", [".jsonl", ".json", ".jsonl.gz", ".parquet", ".arrow"])
def test_rows_are_judged_and_a_fault_has_its_place(end: str, folder: Path) -> None:
    file = folder / os.fsdecode(b"rows\xff" + end.encode())
    write(file, [ROW])
    assert judge(file, tokenizer="spm-v3").ok
    write(file, [ROW, BAD])
    [finding] = [one for one in judge(file, tokenizer="spm-v3").findings if one.severity == "error"]
    assert finding.rule == "ML601"
    assert "rows\\udcff" in str(finding.place)


def test_encoded_rows_and_a_checkpoint_are_judged(folder: Path) -> None:
    file = folder / os.fsdecode(b"rows\xff.jsonl")
    write(file, [ENCODED])
    assert audit(file, tokenizer="spm-v3").ok
    base = write_tiny_base(folder / "base", shipped_tokenizer("spm-v3"))
    (base / "model.safetensors").rename(folder / "weights")
    assert judge(file, tokenizer=base).ok
    assert [one.rule for one in judge(base).findings if one.severity == "error"] == []


def test_a_name_that_no_record_can_hold_is_refused_before_a_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny_base(folder / "base", cut_v3())
    write(folder / "rows.jsonl", [ROW])
    recipe = {
        "base": {"path": "base", "weights_sha256": "0" * 64},
        "data": {"train": ["rows.jsonl"]},
        "lora": {"r": 2, "alpha": 4, "dropout": 0, "target_modules": ["q_proj"]},
        "training": {"learning_rate": 0.001, "epochs": 1, "batch_size": 1, "max_length": 64, "seed": 0},
        "output": "out",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    assert main(["train", str(folder / "recipe.yaml")]) == 2
    assert "cannot be recorded" in capsys.readouterr().err
    (folder / "recipe.yaml").write_text(json.dumps({**recipe, "base": {"path": "base"}}))
    assert main(["train", str(folder / "recipe.yaml")]) == 2
    assert "needs weights_sha256" in capsys.readouterr().err
