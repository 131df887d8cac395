"""A guard judges rows of a kind, and with a type of chunk, that tests bring along."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guarded_runs import begin, errors_of, make_trainer
from toys import Data, asides, ids_alone, poems, toys_known, with_ids
from transformers import DataCollatorWithFlattening

from pytest_mistral_lora import audit
from pytest_mistral_lora.chat.oracle import Oracle

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Records = Callable[[], list[Data]]


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with toys_known():
        yield


@pytest.mark.parametrize(("records", "alone"), [(poems, False), (asides, True)], ids=["records", "ids alone"])
def test_its_batches_are_judged(records: Records, alone: bool, base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = with_ids(oracle, records())
    given = ids_alone(rows) if alone else rows
    verdict = begin(make_trainer(base, given, tmp_path)).verdict
    assert (verdict.ok, errors_of(verdict)) == (True, set())
    assert verdict.facts["batches::encoded::labels"]["judged"] == len(rows)
    assert ("read back" in str(verdict.facts["batches::encoded::ids"]["encoded rows of"])) is alone
    given[5]["labels"][-1] = -100
    verdict = begin(make_trainer(base, given, tmp_path), on_finding="warn").verdict
    assert errors_of(verdict) == {("ML546", "train_dataset[5]")}
    assert "ML546" in verdict._repr_html_()


def test_ids_of_another_record_are_found(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = with_ids(oracle, asides())
    rows[2] |= {key: rows[1][key] for key in ("input_ids", "labels")}
    verdict = begin(make_trainer(base, rows, tmp_path), on_finding="warn").verdict
    assert {place for _, place in errors_of(verdict)} == {"train_dataset[2]"}


@pytest.mark.parametrize("records", [poems, asides])
def test_rows_in_memory_are_judged(records: Records, oracle: Oracle) -> None:
    rows = with_ids(oracle, records())
    verdict = audit(rows, tokenizer="spm-v3")
    assert (verdict.ok, verdict.findings) == (True, ())
    verdict = audit([*rows, rows[3]], tokenizer="spm-v3")
    assert {(finding.rule, str(finding.place)) for finding in verdict.findings} == {("ML608", "rows[8]")}


def test_packed_batches_are_compared_with_the_records(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = with_ids(oracle, poems())
    rows[2]["labels"][-1] = -100
    trainer = make_trainer(base, rows, tmp_path, per_device_train_batch_size=4, train_sampling_strategy="sequential")
    trainer.data_collator = DataCollatorWithFlattening(return_position_ids=True)
    verdict = begin(trainer, on_finding="warn").verdict
    facts = str(verdict.facts["batches::encoded::ids"]["encoded rows of"])
    assert "read back" not in facts
    assert {rule for rule, _ in errors_of(verdict)} >= {"ML546"}
