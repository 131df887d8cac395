"""The first batches of a run's evaluations are judged as those of its training are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from guarded_runs import begin, chat_rows, encoded, losses_of, make_trainer
from transformers import Trainer

from pytest_mistral_lora import GuardError, MistralGuard, Verdict, guard
from pytest_mistral_lora.chat.oracle import Oracle

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]


@pytest.fixture
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8), messages=True)


@pytest.fixture
def held_out(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(16)[8:], messages=True)


def _places(verdict: Verdict | None) -> list[tuple[str, str]]:
    assert verdict is not None
    return [(finding.rule, str(finding.place)) for finding in verdict.findings]


@pytest.mark.parametrize("is_named", [False, True], ids=["one dataset", "datasets by name"])
def test_a_fault_in_an_evaluation_stops_the_run(
    is_named: bool, base: Path, rows: Rows, held_out: Rows, tmp_path: Path
) -> None:
    broken = [{**row, "labels": [*row["labels"][:-1], -100]} if n == 3 else row for n, row in enumerate(held_out)]
    whole, faulty = Dataset.from_list(held_out), Dataset.from_list(broken)
    trainer = make_trainer(base, rows, tmp_path, evaluation={"a": whole, "b": faulty} if is_named else faulty)
    loaders = len(trainer.accelerator._dataloaders)
    callback = MistralGuard()
    trainer.add_callback(callback)
    with pytest.raises(GuardError, match="before a weight moves"):
        trainer.train()
    place = "eval_dataset['b'][3]" if is_named else "eval_dataset[3]"
    assert _places(callback.verdict) == [("ML546", place)]
    assert callback.verdict is not None
    judged = callback.verdict.facts["eval_batches::encoded::labels"]["judged"]
    assert judged == (16 if is_named else 8)
    assert callback.verdict.facts["batches::encoded::labels"]["judged"] == 8
    assert losses_of(trainer) == []
    # the loader of the training alone
    assert len(trainer.accelerator._dataloaders) == loaders + 1


def test_rows_that_are_trained_on_and_evaluated_are_a_note(
    base: Path, rows: Rows, held_out: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leaked = Dataset.from_list([*held_out[:2], rows[5], rows[3]])
    verdict = guard(make_trainer(base, rows, tmp_path, evaluation=leaked)).check()
    assert verdict.ok
    [finding] = verdict.findings
    assert (finding.rule, str(finding.place), finding.more) == ("ML611", "eval_dataset[2]", 1)
    assert [str(place) for place in finding.others] == ["train_dataset[5]"]
    facts = verdict.facts["eval_batches::dataset::no-leakage"]
    assert facts == {"rows": 4, "compared with": 8}
    first, note = capsys.readouterr().out.splitlines()
    assert "; 1 note; " in first
    assert note == "  note ML611 eval_dataset[2]: the row is also trained on: train_dataset[5]"


def test_a_fault_in_every_row_of_both_is_one_cause(base: Path, rows: Rows, tmp_path: Path) -> None:
    for row in rows:
        row["labels"] = list(row["input_ids"])
    callback = begin(make_trainer(base, rows, tmp_path, evaluation=Dataset.from_list(rows)), on_finding="warn")
    found = {place.partition("[")[0] for rule, place in _places(callback.verdict) if rule == "ML543"}
    assert found == {"train_dataset", "eval_dataset"}


def _stream(rows: Rows) -> Any:
    return IterableDataset.from_generator(lambda: iter(rows))


class Unreadable(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("evaluation", "reason"),
    [
        (_stream, "eval_dataset: the dataset is a stream"),
        (lambda rows: Unreadable(), "a look at a row of a Unreadable may change the next one"),
    ],
    ids=["stream", "unreadable"],
)
def test_an_evaluation_that_cannot_be_read_is_not_checked(
    evaluation: Any, reason: str, base: Path, rows: Rows, tmp_path: Path
) -> None:
    callback = begin(make_trainer(base, rows, tmp_path, evaluation=evaluation(rows)))
    assert callback.verdict is not None
    assert (callback.verdict.ok, callback.verdict.findings) == (True, ())
    assert reason in callback.verdict.not_checked["eval_batches::encoded::rows"]


class OwnLoaders(Trainer):
    """A trainer with loaders of its own for evaluation."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        raise OSError("it is called")


def test_a_loader_that_the_users_code_makes_is_not_made_before(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, evaluation=Dataset.from_list(rows))
    trainer.__class__ = OwnLoaders
    callback = begin(trainer)
    assert callback.verdict is not None
    assert (
        "OwnLoaders.get_eval_dataloader is code of your own"
        in callback.verdict.not_checked["eval_batches::encoded::rows"]
    )


def test_a_run_that_evaluates_has_the_same_losses(
    base: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "max_steps": 1}
    found = []
    for guarded in (False, True):
        evaluation = Dataset.from_list(rows)
        trainer = make_trainer(base, rows, tmp_path / str(guarded), evaluation=evaluation, **settings)
        if guarded:
            callback = guard(trainer)
        trainer.train()
        evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
        found.append([losses_of(trainer), evaluated])
    assert found[0] == found[1]
    assert len(found[0][1]) == 2
    assert callback.verdict is not None
    lines = (capsys.readouterr()).out.splitlines()
    [line] = [line for line in lines if line.startswith("mistral guard:")]
    assert "8 of 8 rows for evaluation judged" in line
    assert "first-loss" not in line
    # the evaluation before the first step is not the first step
    assert "labels" in callback.verdict.facts["trainer::train::first-loss"]
