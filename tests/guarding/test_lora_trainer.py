"""The guard in this package's own trainer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from guarded_runs import Losses, chat_rows, lora_model, losses_of
from pydantic import TypeAdapter

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.chat.encoded import IGNORE_INDEX, EncodedRow
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.training.loop import make_trainer
from pytest_mistral_lora.training.recipe import Training

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def encoded_rows(oracle: Oracle) -> list[EncodedRow]:
    return [oracle.encode(row) for row in chat_rows(12)]


def _trainer(base: Path, rows: list[EncodedRow], work: Path) -> Any:
    training = TypeAdapter(Training).validate_python(
        {"steps": 2, "batch_size": 4, "learning_rate": 0.01, "logging_steps": 1}
    )
    trainer = make_trainer(lora_model(base), training, rows, (), work=work)
    trainer.processing_class = BaseFolder(base).tokenizer().fast
    trainer.callback_handler.processing_class = trainer.processing_class
    trainer.add_callback(Losses())
    return trainer


def test_every_loss_is_the_same(base: Path, encoded_rows: list[EncodedRow], tmp_path: Path) -> None:
    found = []
    for guarded in (False, True):
        trainer = _trainer(base, encoded_rows, tmp_path / str(guarded))
        if guarded:
            guard(trainer, on_finding="warn")
        trainer.train()
        found.append(losses_of(trainer))
    assert found[0] == found[1]
    assert len(found[0]) == 2
    assert len(set(found[0])) == 2


def test_a_masked_eos_stops_it(base: Path, encoded_rows: list[EncodedRow], tmp_path: Path) -> None:
    row = encoded_rows[7]
    encoded_rows[7] = replace(row, labels=(*(row.labels or ())[:-1], IGNORE_INDEX))
    trainer = _trainer(base, encoded_rows, tmp_path)
    guard(trainer)
    with pytest.raises(GuardError, match=r"ML546 train_dataset\[7\]"):
        trainer.train()
