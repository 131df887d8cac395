"""The code between a row's line and its loss is short enough to be read: the files that it runs through are counted."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_loop import trainer_of
from tiny_runs import MakeRecipe

import pytest_mistral_lora
from pytest_mistral_lora.checkpoint.encoder import make_encoder
from pytest_mistral_lora.checkpoint.tokenizers import CheckpointTokenizer
from pytest_mistral_lora.training.rows import RowDataset, loading
from pytest_mistral_lora.training.step import forward
from pytest_mistral_lora.training.step.trainer import LoraTrainer

PACKAGE = Path(pytest_mistral_lora.__file__).parent
MOST_FILES = 25
ONE_STEP = {"steps": 1, "dry_run": False}


def test_a_row_reaches_its_loss_through_few_files(
    make_recipe: MakeRecipe, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, encoder = make_recipe(training=ONE_STEP), make_encoder("mistral-common", CheckpointTokenizer(base))
    trainer = trainer_of(recipe, base, tmp_path)
    loading.load_data(recipe, encoder)  # loads the tokenizer, too
    files: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        file = Path(frame.f_code.co_filename)
        if event == "call" and file.is_relative_to(PACKAGE):
            files.add(file.relative_to(PACKAGE).as_posix())

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            sys.setprofile(note)
            try:
                return function(*args, **kwargs)
            finally:
                sys.setprofile(None)

        return run

    def noted_to_its_end(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(trainer, *args, **kwargs)
        sys.setprofile(None)
        return loss

    compute_loss = LoraTrainer.compute_loss
    # the line is read and encoded, drawn and collated by the loader, and becomes a part of the step's loss
    monkeypatch.setattr(loading, "encode_files", noted(loading.encode_files))
    monkeypatch.setattr(RowDataset, "__getitem__", noted(RowDataset.__getitem__))
    monkeypatch.setattr(forward, "collate", noted(forward.collate))
    monkeypatch.setattr(LoraTrainer, "training_step", noted(LoraTrainer.training_step))
    monkeypatch.setattr(LoraTrainer, "compute_loss", noted_to_its_end)
    loading.load_data(recipe, encoder)
    trainer.train()
    assert {"chat/reading/files.py", "training/rows/dataset.py", "training/step/forward.py"} <= files
    assert len(files) <= MOST_FILES, "\n".join(sorted(files))
