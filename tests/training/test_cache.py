"""Encoded rows are kept, and made anew whenever anything that decides them is another."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from many_rows import ROWS, encoder_of, kept, load, numbered, said, write_lines
from sampling import sampled_case

from pytest_mistral_lora.chat.encoded import EncodedRow, Policy
from pytest_mistral_lora.chat.reading import chunks
from pytest_mistral_lora.chat.reading.chunks import CHUNK_LINES, DataFile
from pytest_mistral_lora.chat.rows import Row
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training.rows import loading
from pytest_mistral_lora.training.rows.encoding import EncodingPlan, Sinks, encode_files
from pytest_mistral_lora.training.rows.loading import RunData


def contents(data: RunData) -> list[Any]:
    return [[list(split.rows), list(split.encoded), split.figures] for split in (data.train, data.held_out)]


def test_what_comes_from_the_cache_is_what_was_encoded(rows_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = load(rows_folder, data={"held_out": 0.3}), load(rows_folder, data={"held_out": 0.3})
    assert contents(first) == contents(again)
    assert [one.place for one in again.train.rows] == [one.place for one in first.train.rows]
    monkeypatch.setattr(chunks, "MANY_BYTES", 10**9)
    assert contents(load(rows_folder, data={"held_out": 0.3})) == contents(first)
    oracle = encoder_of().tokenizer.oracle
    assert list(first.train.encoded) == [oracle.encode(row) for row in first.train.rows]
    assert len(first.train.rows) + len(first.held_out.rows) == ROWS


def test_the_same_rows_are_encoded_once_wherever_they_are(rows_folder: Path) -> None:
    load(rows_folder)
    before = kept(rows_folder)
    assert len(before) == 1
    load(rows_folder, learning_rate=0.5)
    (rows_folder / "rows.jsonl").rename(rows_folder / "moved.jsonl")
    moved = load(rows_folder, data={"train": ["moved.jsonl"]})
    assert kept(rows_folder) == before
    assert str(moved.train.rows[7].place) == f"{rows_folder / 'moved.jsonl'}:8"


def change_a_letter(rows_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (rows_folder / "rows.jsonl").read_text()
    (rows_folder / "rows.jsonl").write_text(rows.replace("Answer 599.", "Answer 59x."))


def change_the_version(rows_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "__version__", "999")


def change_the_format(rows_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "FORMAT", 999)


def change_a_library(rows_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "version", lambda name: "999")


@pytest.mark.parametrize("change", [change_a_letter, change_the_version, change_the_format, change_a_library])
def test_what_is_outside_the_recipe_is_part_of_the_key(
    change: Callable[[Path, pytest.MonkeyPatch], None], rows_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(rows_folder)
    change(rows_folder, monkeypatch)
    load(rows_folder)
    assert len(kept(rows_folder)) == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"max_length": 4095},
        {"truncation": "drop"},
        {"truncation": "right"},
        {"unsupervised": "warn"},
        {"unsupervised": "drop"},
        {"data": {"held_out": 0.5}},
        {"data": {"eval": ["more.jsonl"]}},
        {"data": {"train": ["rows.jsonl", "more.jsonl"]}},
        {"data": {"train": ["more.jsonl"], "eval": ["rows.jsonl"]}},
    ],
    ids=str,
)
def test_each_choice_of_the_recipe_is_part_of_the_key(keys: dict[str, Any], rows_folder: Path) -> None:
    write_lines(rows_folder / "more.jsonl", [said("More?", "More.")])
    for one in ({}, keys):
        load(rows_folder, **one)
    assert len(kept(rows_folder)) == 2


def test_the_tokenizer_is_part_of_the_key(rows_folder: Path) -> None:
    loaded = [load(rows_folder, encoder_of(tokenizer=name)) for name in ("spm-v3", "spm-v1")]
    assert len(kept(rows_folder)) == 2
    assert loaded[0].train.figures.sha256["ids"] != loaded[1].train.figures.sha256["ids"]


def test_the_template_is_part_of_the_key_where_it_encodes(rows_folder: Path, full_base: Path) -> None:
    write_lines(rows_folder / "rows.jsonl", numbered(5))
    base = Path(shutil.copytree(full_base, rows_folder / "base"))
    load(rows_folder, make_encoder("chat-template", CheckpointTokenizer(base)), backend="chat-template")
    template = base / "chat_template.jinja"
    template.write_text("{# ours #}" + template.read_text())
    load(rows_folder, make_encoder("chat-template", CheckpointTokenizer(base)), backend="chat-template")
    assert len(kept(rows_folder)) == 2


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


SAMPLE = ("bit", "missing", "wrong figure")
DAMAGES: dict[str, Callable[[Path], None]] = {
    "bit": lambda one: flip(one / "train.arrow"),
    "short": lambda one: os.truncate(one / "train.arrow", 100),
    "missing": lambda one: (one / "held_out.arrow").unlink(),
    "no figures": lambda one: (one / "figures.json").unlink(),
    "half of the figures": lambda one: os.truncate(one / "figures.json", 100),
    "other figures": lambda one: (one / "figures.json").write_text("[]"),
    "wrong figure": lambda one: (
        (one / "figures.json").write_text(
            (one / "figures.json").read_text().replace(f'"used": {ROWS}', f'"used": {ROWS - 1}')
        )
        and None
    ),
}


@pytest.mark.parametrize("damage", [sampled_case(DAMAGES[name], name=name, is_kept=name in SAMPLE) for name in DAMAGES])
def test_a_damaged_cache_is_made_anew(
    damage: Callable[[Path], None], rows_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sound = contents(load(rows_folder))
    [name] = kept(rows_folder)
    before = (rows_folder / "cache" / name / "figures.json").read_text()
    damage(rows_folder / "cache" / name)
    assert contents(load(rows_folder)) == sound
    assert "damaged" in caplog.text
    assert (rows_folder / "cache" / name / "figures.json").read_text() == before
    caplog.clear()
    load(rows_folder)
    assert caplog.text == ""


def test_other_processes_of_a_run_look_at_sizes_only(rows_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(rows_folder)
    before = kept(rows_folder)
    [name] = before
    flip(rows_folder / "cache" / name / "train.arrow")
    monkeypatch.setenv("LOCAL_RANK", "1")
    load(rows_folder)
    assert kept(rows_folder) == before
    os.truncate(rows_folder / "cache" / name / "train.arrow", 100)
    load(rows_folder)
    assert kept(rows_folder) != before


def alive() -> int:
    gc.collect()
    return sum(type(one) in (Row, EncodedRow) for one in gc.get_objects())


def test_neither_rows_nor_encodings_stay_in_memory(rows_folder: Path) -> None:
    """What is held while rows are encoded does not grow with their number, and afterwards nothing is."""
    others = alive()
    seen: list[int] = []
    plan = EncodingPlan(encoder_of().tokenizer.path, "mistral-common", Policy(4096), 0.0)
    files = [DataFile(write_lines(rows_folder / "more.jsonl", numbered(6 * CHUNK_LINES)), False)]
    encode_files(plan, files, Sinks(lambda batch: seen.append(alive()), lambda batch: None), processes=1)
    assert len(seen) == 6
    assert max(seen) - others < CHUNK_LINES
    load(rows_folder)  # what is imported for this is no part of it
    before = pa.total_allocated_bytes()
    data = load(rows_folder)
    assert alive() == others
    assert pa.total_allocated_bytes() - before < 1000
    for row, encoded in zip(data.train.rows[:5], data.train.encoded, strict=False):
        assert row.messages
        assert encoded.input_ids
        assert alive() - others <= 5 + 2
    held = [list(split) for split in (data.train.rows, data.train.encoded)]
    assert alive() - others >= 2 * len(held[0])


def test_a_cache_that_cannot_be_written_says_what_to_do(rows_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_LORA_CACHE", str(rows_folder / "rows.jsonl" / "cache"))
    with pytest.raises(InputError, match=r"cannot be kept here: .*MISTRAL_LORA_CACHE"):
        load(rows_folder)


def test_the_cache_is_where_the_other_caches_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MISTRAL_LORA_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert loading.cache_folder() == tmp_path / "mistral-lora"
    monkeypatch.delenv("HF_HOME")
    assert loading.cache_folder() == Path.home() / ".cache" / "huggingface" / "mistral-lora"


def test_the_datasets_library_opens_the_files(rows_folder: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = load(rows_folder)
    [name] = kept(rows_folder)
    opened = datasets.Dataset.from_file(str(rows_folder / "cache" / name / "train.arrow"))
    assert len(opened) == ROWS
    assert opened[5]["input_ids"] == list(data.train.encoded[5].input_ids)
    assert json.loads(opened[5]["line"]) == numbered(6)[5]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="without owners and modes")
def test_rows_that_others_could_have_written_are_encoded_again(
    rows_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(rows_folder)
    before = kept(rows_folder)
    load(rows_folder)
    assert kept(rows_folder) == before
    (rows_folder / "cache").chmod(0o777)
    load(rows_folder)
    assert kept(rows_folder) != before
    assert f"other users can write {rows_folder / 'cache'}" in caplog.text
    (rows_folder / "cache").chmod(0o755)
    before = kept(rows_folder)
    load(rows_folder)
    assert kept(rows_folder) == before
