"""Rows, a model and a tokenizer in memory are judged in memory: no file is opened for writing, and no folder made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset, DatasetDict
from guarded_runs import begin, chat_rows, encoded, make_trainer
from watched_writes import watched_writes

from pytest_mistral_lora import GuardError, Verdict, audit
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.checkpoint.base_folder import BaseFolder

# PEFT and Trainer warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]


@pytest.fixture
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(4), messages=True)


def masked(rows: Rows) -> Rows:
    """Return the rows, the second without a label at its EOS."""
    return [row | {"labels": [*row["labels"][:-1], -100]} if n == 1 else row for n, row in enumerate(rows)]


def batch(rows: Rows) -> dict[str, Any]:
    """Return the rows as tensors, padded."""
    columns = [[torch.tensor(row[key]) for row in rows] for key in ("input_ids", "labels")]
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    masks = [torch.ones_like(ids) for ids in columns[0]]
    return {
        key: torch.nn.utils.rnn.pad_sequence(column, batch_first=True, padding_value=fills[key])
        for key, column in zip(fills, (*columns, masks), strict=True)
    }


FORMS: dict[str, Callable[[Rows], Any]] = {
    "list": list,
    "arrays": lambda rows: [row | {"input_ids": numpy.array(row["input_ids"])} for row in rows],
    "batch": batch,
    "Dataset": Dataset.from_list,
    "DatasetDict": lambda rows: DatasetDict(train=Dataset.from_list(rows)),
    "generator": iter,
}


def rules_of(verdict: Verdict) -> set[tuple[str, str]]:
    return {(finding.rule, str(finding.place)) for finding in verdict.findings}


@pytest.mark.parametrize("form", FORMS)
def test_an_audit_of_rows_writes_nothing(form: str, rows: Rows, base: Path) -> None:
    sound, faulty = FORMS[form](rows), FORMS[form](masked(rows))
    with watched_writes() as seen:
        assert rules_of(audit(sound, tokenizer="spm-v3")) == set()
        verdict = audit(faulty, tokenizer=base if form == "list" else "spm-v3")
        assert "ML546" in str(verdict)
        assert verdict.findings[0].rule == "ML546"
        repr(verdict)
    assert seen == []


def test_a_guard_writes_nothing(rows: Rows, base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path / "out")
    faulty = make_trainer(base, masked(rows), tmp_path / "out")
    with watched_writes() as seen:
        assert begin(trainer).verdict.ok  # type: ignore[union-attr]
        with pytest.raises(GuardError) as stopped:
            begin(faulty)
    assert rules_of(stopped.value.verdict) == {("ML546", "train_dataset[1]")}
    assert seen == []


def test_the_faults_of_a_model_and_a_tokenizer_are_found_in_memory(rows: Rows, base: Path, tmp_path: Path) -> None:
    tokenizer = BaseFolder(base).tokenizer().fast
    trainer = make_trainer(base, rows, tmp_path / "out", tokenizer=tokenizer)
    trainer.model.config.eos_token_id = 7
    trainer.model.generation_config.bos_token_id = 9
    tokenizer.bos_token = "[INST]"
    tokenizer.chat_template = tokenizer.chat_template.replace("[/INST]", "[/INST]!")
    with watched_writes() as seen, pytest.raises(GuardError) as stopped:
        begin(trainer)
    assert rules_of(stopped.value.verdict) == {
        ("ML203", "processing_class"),
        ("ML217", "model.config"),
        ("ML217", "model.generation_config"),
        ("ML442", "processing_class, chat_template"),
    }
    assert seen == []


def test_a_tokenizer_in_memory_is_recognised_by_its_vocabulary(rows: Rows, base: Path, tmp_path: Path) -> None:
    tokenizer = BaseFolder(base).tokenizer().fast
    tokenizer.name_or_path = ""
    trainer = make_trainer(base, rows, tmp_path / "out", tokenizer=tokenizer)
    with watched_writes() as seen:
        verdict = begin(trainer).verdict
    assert verdict is not None
    assert verdict.facts["trainer::tokenizer::oracle"]["oracle of"].startswith("recognised as spm-v3: 32,768 of")
    assert seen == []


def test_a_trainer_without_a_tokenizer_is_judged_in_memory(rows: Rows, base: Path, tmp_path: Path) -> None:
    trainer = make_trainer(base, masked(rows), tmp_path / "out", per_device_train_batch_size=1)
    trainer.processing_class = None
    trainer.model.config.eos_token_id = 5
    with watched_writes() as seen, pytest.raises(GuardError) as stopped:
        begin(trainer)
    assert rules_of(stopped.value.verdict) == {("ML546", "train_dataset[1]"), ("ML217", "model.config")}
    assert seen == []
