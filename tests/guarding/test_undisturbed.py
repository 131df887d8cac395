"""With and without the guard, each loss of a run is the same, bit for bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from guarded_runs import chat_rows, encoded, losses_of, make_trainer
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from pytest_mistral_lora import guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.guarding.batches import next_batches, undisturbed

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> list[dict[str, Any]]:
    return encoded(oracle, chat_rows(24))


def _losses(base: Path, dataset: Any, output: Path, *, guarded: bool, resume: str = "", **settings: Any) -> list[float]:
    trainer = make_trainer(base, dataset, output, **{"gradient_accumulation_steps": 1, **settings})
    if guarded:
        assert guard(trainer, on_finding="warn", batches=4, every=2).verdict is None
    trainer.train(resume_from_checkpoint=resume or None)
    return losses_of(trainer)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"dataloader_num_workers": 0}, marks=pytest.mark.slow),
        {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
        pytest.param({"accelerator_config": {"use_seedable_sampler": False}}, marks=pytest.mark.slow),
        pytest.param({"train_sampling_strategy": "group_by_length", "max_steps": 9}, marks=pytest.mark.slow),
    ],
    ids=["in this process", "workers", "global seed", "by length"],
)
def test_a_shuffled_run_has_the_same_losses(
    settings: dict[str, Any], base: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = [_losses(base, rows, tmp_path / str(guarded), guarded=guarded, **settings) for guarded in (False, True)]
    assert found[0] == found[1]
    assert len(set(found[0])) == len(found[0]) >= 5


def test_a_resumed_run_has_the_same_losses(base: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3}
    whole = _losses(base, rows, tmp_path / "whole", guarded=False, **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = [
        _losses(base, rows, tmp_path / str(guarded), guarded=guarded, resume=checkpoint, **settings)
        for guarded in (False, True)
    ]
    assert resumed[0] == resumed[1] == whole[3:]


class RandomRows(Dataset[Any]):
    """Rows that change with each look: by generators of their own, by a counter and by the global ones."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.reads = rows, 0
        self.of_torch = torch.Generator().manual_seed(1)
        self.of_numpy, self.of_python = numpy.random.default_rng(1), random.Random(1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        draws = [
            int(torch.randint(0, 9, (), generator=self.of_torch)),
            int(self.of_numpy.integers(0, 9)),
            self.of_python.randrange(9),
            random.randrange(9),
            int(numpy.random.randint(0, 9)),
            int(torch.randint(0, 9, ())),
            self.reads % 9,
        ]
        ids = [1, 3, *(100 + draw for draw in draws), 4, 500 + index, 2]
        return {"input_ids": ids, "labels": [-100] * (len(ids) - 2) + ids[-2:]}


@pytest.mark.slow
def test_a_dataset_with_random_states_of_its_own_has_the_same_losses(
    base: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    found = [
        _losses(base, RandomRows(rows), tmp_path / str(guarded), guarded=guarded, remove_unused_columns=False)
        for guarded in (False, True)
    ]
    assert found[0] == found[1]


class Stream(IterableDataset[Any]):
    """Rows that come once: a second reader would take them from the first."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.left = iter(rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.left


def test_a_stream_has_the_same_losses(base: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    found = [_losses(base, Stream(rows), tmp_path / str(guarded), guarded=guarded) for guarded in (False, True)]
    assert found[0] == found[1]
    assert len(found[0]) == 5


class NextBatches(TrainerCallback):  # type: ignore[misc]
    """Keeps the batches that the guard makes before the run, and those that the model gets."""

    def __init__(self, epoch: int, skipped: int) -> None:
        self.epoch, self.skipped = epoch, skipped
        self.ahead: list[Any] = []
        self.fed: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with undisturbed(None):
            found = next_batches(kwargs["train_dataloader"], None, 4, epoch=self.epoch, skipped=self.skipped)
        self.ahead = [batch.data["input_ids"].tolist() for batch in found.batches]
        kwargs["model"].register_forward_pre_hook(self._take, with_kwargs=True)

    def _take(self, model: Any, given: Any, named: Any) -> None:
        self.fed.append(named["input_ids"].tolist())


@pytest.mark.parametrize(
    ("step", "epoch", "skipped", "seeded"),
    [
        pytest.param(0, 0, 0, True, marks=pytest.mark.slow),
        (0, 0, 0, False),
        (4, 0, 8, True),
        pytest.param(8, 1, 4, True, marks=pytest.mark.slow),
    ],
)
def test_the_batches_are_those_that_the_model_gets(
    step: int, epoch: int, skipped: int, seeded: bool, base: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"max_steps": step + 2, "save_strategy": "steps", "save_steps": 4}
    settings["accelerator_config"] = {"use_seedable_sampler": seeded}
    if step:
        make_trainer(base, rows, tmp_path, **settings | {"max_steps": step}).train()
    trainer = make_trainer(base, rows, tmp_path, **settings)
    watch = NextBatches(epoch, skipped)
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}") if step else None)
    assert watch.ahead == watch.fed[:4]
