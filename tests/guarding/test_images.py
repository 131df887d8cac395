"""Rows with images are judged by the grids in their ids; without such ids, a batch with pixels is not checked."""

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


def test_rows_with_ids_of_images_are_read_back(seeing_base: Path, seeing: Oracle, tmp_path: Path) -> None:
    rows = encoded(seeing, chat_rows(8))
    for row in rows[:3]:
        _show(row, seeing)
    verdict = begin(make_trainer(seeing_base, rows, tmp_path)).verdict
    assert verdict is not None
    assert verdict.findings == ()
    assert verdict.facts["batches::encoded::labels"]["judged"] == 8
    assert not [name for name in verdict.not_checked if name.endswith("media")]


def test_an_image_that_no_message_and_no_tensor_has_is_a_fault(
    seeing_base: Path, seeing: Oracle, tmp_path: Path
) -> None:
    rows = encoded(seeing, chat_rows(4), messages=True)
    _show(rows[1], seeing)
    verdict = begin(make_trainer(seeing_base, rows, tmp_path), on_finding="warn").verdict
    assert errors_of(verdict) == {("ML562", "train_dataset[1]")}


@pytest.mark.parametrize("shown", [True, False], ids=["ids", "no ids"])
def test_rows_with_pixels_are_judged_if_their_ids_show_them(
    shown: bool, seeing_base: Path, seeing: Oracle, tmp_path: Path
) -> None:
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
    unchecked = verdict.not_checked.get("trainer::encoded::media")
    assert unchecked == (None if shown else "media: 4 of 8 rows have an image")
    assert errors_of(verdict) == {("ML546", "train_dataset[6]")}


def test_a_text_that_became_a_marker_of_images_is_a_fault(seeing_base: Path, seeing: Oracle, tmp_path: Path) -> None:
    rows = encoded(seeing, chat_rows(4), messages=True)
    for row in rows:
        _show(row, seeing)
        row["messages"][0] = {"role": "user", "content": "".join(IMAGE) + row["messages"][0]["content"]}
    verdict = begin(make_trainer(seeing_base, rows, tmp_path), on_finding="warn").verdict
    assert {rule for rule, _ in errors_of(verdict)} == {"ML523"}


def test_a_file_with_ids_of_images_is_read_back(seeing: Oracle, tmp_path: Path) -> None:
    rows = encoded(seeing, chat_rows(4))
    _show(rows[1], seeing)
    verdict = audit(rows, tokenizer="spm-v7m1")
    assert verdict.ok
    assert verdict.findings == ()
    assert verdict.facts["rows::encoded::ids"]["judged"] == 4
    rows[1]["input_ids"].remove(seeing.control_ids["[IMG]"])
    rows[1]["labels"].pop(0)
    file = tmp_path / "images.jsonl"
    file.write_text(json.dumps(rows[1]) + "\n")
    [finding] = audit(file, tokenizer="spm-v7m1").findings
    assert finding.rule == "ML560"


def test_ids_of_images_of_a_tokenizer_without_settings_of_images_are_not_checked(seeing: Oracle) -> None:
    rows = encoded(seeing, chat_rows(2))
    _show(rows[1], seeing)
    verdict = audit(rows, tokenizer="spm-v7")
    assert verdict.findings == ()
    assert verdict.not_checked["rows::encoded::file"].startswith("image (the tokenizer file has no settings of images)")
