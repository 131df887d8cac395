"""Rows with images are not judged: mistral-common encodes them from their pixels alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from guarded_runs import begin, chat_rows, encoded, errors_of, make_trainer

from pytest_mistral_lora import audit
from pytest_mistral_lora.chat.oracle import Oracle, shipped_tokenizer
from pytest_mistral_lora.checkpoint.tiny_model import write_tiny_base

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]
IMAGE = ("[IMG]", "[IMG]", "[IMG_BREAK]", "[IMG]", "[IMG]", "[IMG_END]")
"""The tokens of an image of two by two patches."""


@pytest.fixture(scope="module")
def seeing() -> Oracle:
    """A small tokenizer with images."""
    return Oracle(shipped_tokenizer("spm-v7m1"))


@pytest.fixture(scope="module")
def seeing_base(seeing: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("seeing") / "base", seeing.path)


def _show(row: dict[str, Any], oracle: Oracle) -> None:
    """Put the tokens of an image behind the first marker of the user's turn."""
    ids = [oracle.control_ids[literal] for literal in IMAGE]
    at = row["input_ids"].index(oracle.control_ids["[INST]"]) + 1
    row["input_ids"][at:at] = ids
    row["labels"][at:at] = [-100] * len(ids)


@pytest.mark.parametrize("messages", [True, False], ids=["with messages", "ids alone"])
def test_rows_with_ids_of_images_are_not_checked(
    messages: bool, seeing_base: Path, seeing: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = encoded(seeing, chat_rows(8), messages=messages)
    for row in rows[:3]:
        _show(row, seeing)
    callback = begin(make_trainer(seeing_base, rows, tmp_path))
    callback.on_train_end(None, None, None)
    verdict = callback.verdict
    assert verdict is not None
    assert errors_of(verdict) == set()
    assert verdict.not_checked["trainer::encoded::images"] == "images: 3 of 8 rows have an image"
    assert verdict.facts["batches::encoded::labels"]["judged"] == 5
    line = capsys.readouterr().out
    assert "5 of 8 rows judged" in line
    assert "images: 3 of 8 rows have an image" in line


def test_a_run_of_images_alone_is_not_checked(seeing_base: Path, seeing: Oracle, tmp_path: Path) -> None:
    rows = encoded(seeing, chat_rows(4))
    for row in rows:
        _show(row, seeing)
    verdict = begin(make_trainer(seeing_base, rows, tmp_path)).verdict
    assert verdict is not None
    assert verdict.findings == ()
    assert verdict.not_checked["trainer::encoded::images"] == "images: 4 of 4 rows have an image"


@pytest.mark.parametrize("shown", [True, False], ids=["ids", "no ids"])
def test_rows_with_pixels_are_not_checked(shown: bool, seeing_base: Path, seeing: Oracle, tmp_path: Path) -> None:
    rows = encoded(seeing, chat_rows(8), messages=True)
    if shown:
        for row in rows[:4]:
            _show(row, seeing)
    else:
        rows[1]["labels"][-1] = -100
    rows[6]["labels"][-1] = -100
    settings = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential"}
    trainer = make_trainer(seeing_base, rows, tmp_path, **settings)
    pads = trainer.data_collator

    def collate(items: Rows) -> Any:
        batch = pads(items)
        is_first = items[0]["input_ids"] == rows[0]["input_ids"]
        return batch | ({"pixel_values": torch.zeros(1, 3, 4, 4)} if is_first else {})

    trainer.data_collator = collate
    verdict = begin(trainer, on_finding="warn").verdict
    assert verdict is not None
    assert verdict.not_checked["trainer::encoded::images"] == "images: 4 of 8 rows have an image"
    assert errors_of(verdict) == {("ML546", "train_dataset[6]")}


def test_a_text_that_became_a_marker_of_images_is_a_fault(seeing_base: Path, seeing: Oracle, tmp_path: Path) -> None:
    rows = encoded(seeing, chat_rows(4), messages=True)
    for row in rows:
        _show(row, seeing)
        row["messages"][0] = {"role": "user", "content": "".join(IMAGE) + row["messages"][0]["content"]}
    verdict = begin(make_trainer(seeing_base, rows, tmp_path), on_finding="warn").verdict
    assert {rule for rule, _ in errors_of(verdict)} == {"ML523"}


def test_a_file_with_ids_of_images_is_not_checked(seeing: Oracle, tmp_path: Path) -> None:
    rows = encoded(seeing, chat_rows(4))
    _show(rows[1], seeing)
    verdict = audit(rows, tokenizer="spm-v7m1")
    assert verdict.ok
    assert verdict.findings == ()
    facts = verdict.facts["rows::encoded::ids"]
    assert facts["judged"] == 3
    assert "image in 1 row" in facts["encoded rows of"]
    assert verdict.not_checked["rows::encoded::file"] == "image in 1 row: rows[1]"
    file = tmp_path / "images.jsonl"
    file.write_text(json.dumps(rows[1]) + "\n")
    alone = audit(file, tokenizer="spm-v7m1")
    assert alone.findings == ()
    assert alone.not_checked["images.jsonl::encoded::file"].startswith("image in 1 row: ")
