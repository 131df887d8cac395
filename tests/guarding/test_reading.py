"""The batches that are made before the run, and the rows of those that are not: no state of the run changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from guarded_runs import begin, chat_rows, encoded, errors_of, losses_of, make_trainer
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, RandomSampler, Sampler, Subset
from transformers import DataCollatorForLanguageModeling

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.guarding.batches import BatchSources, next_batches, undisturbed

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8))


class NotedRows(Dataset[Any]):
    """Rows that note each read.

    Attributes:
        note: Notes it.
        reads: The rows that were read.
    """

    def __init__(self, rows: Rows, note: Callable[[int], Any] = lambda index: None) -> None:
        self.rows, self.note = rows, note
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads.append(index)
        self.note(index)
        return dict(self.rows[index])


class OrderedOnce(Sampler[int]):
    """An order that goes on from reading to reading."""

    def __init__(self, size: int) -> None:
        self.size, self.drawn = size, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for number in range(self.size):
            self.drawn += 1
            yield (self.drawn + number) % self.size


def _line(capsys: pytest.CaptureFixture[str]) -> str:
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mistral guard: ")]
    return line


def test_a_dataset_of_the_users_is_read_by_the_run_alone_and_its_rows_are_named(
    base: Path, oracle: Oracle, tmp_path: Path
) -> None:
    rows = encoded(oracle, chat_rows(8))
    rows[5]["labels"] = list(rows[5]["input_ids"])
    dataset = NotedRows(rows)
    trainer = make_trainer(base, dataset, tmp_path, max_steps=2)
    callback = guard(trainer, on_finding="warn", batches=4)
    trainer.train()
    assert sorted(dataset.reads) == list(range(8))
    assert errors_of(callback.verdict) == {("ML543", "train_dataset[5]")}
    faulty = make_trainer(base, NotedRows(rows), tmp_path, max_steps=2)
    guard(faulty)
    with pytest.raises(GuardError, match=r"ML543 train_dataset\[5\]"):
        faulty.train()


def test_the_line_says_why_no_batch_was_made_before(
    base: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(base, NotedRows(rows), tmp_path, max_steps=2)
    guard(trainer, batches=2)
    trainer.train()
    line = _line(capsys)
    assert "read as the model got them, because a look at a row of a NotedRows may change the next one" in line
    assert "4 of 8 rows judged" in line
    assert "4 rows not judged" in line


def test_a_sampler_of_the_users_draws_for_the_run_alone(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=2)
    sampler = OrderedOnce(len(rows))
    trainer._get_train_sampler = lambda dataset=None: sampler
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert "a look at the order of a OrderedOnce may change it" in str(callback.verdict)
    assert sampler.drawn == 8


def test_a_collator_of_the_users_is_called_by_the_run_alone(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=2)
    pads, calls = trainer.data_collator, []

    def collate(items: list[Any]) -> Any:
        calls.append(len(items))
        return pads(items)

    trainer.data_collator = collate
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    assert "collate is not one of a library" in str(callback.verdict)
    assert calls == [2, 2, 2, 2]
    reader = trainer.callback_handler.train_dataloader.base_dataloader
    assert not isinstance(reader.collate_fn, BatchSources)


def test_messages_that_a_collator_takes_out_of_the_rows_are_known(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = encoded(oracle, chat_rows(8), messages=True)
    rows[5]["messages"] = [{"role": "system", "content": "Be brief."}, *rows[5]["messages"]]
    trainer = make_trainer(base, rows, tmp_path, max_steps=2, remove_unused_columns=False)
    pads = trainer.data_collator

    def collate(items: list[Any]) -> Any:
        for item in items:
            del item["messages"]
        return pads(items)

    trainer.data_collator = collate
    callback = guard(trainer, on_finding="warn")
    trainer.train()
    assert errors_of(callback.verdict) == {("ML525", "train_dataset[5]")}


def test_random_states_and_the_order_stay_as_they_were(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, accelerator_config={"use_seedable_sampler": False})
    loader = trainer.get_train_dataloader()
    numpy_state, torch_state = numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    with undisturbed(None):
        first = next_batches(loader, None, 4)
    with undisturbed(None):
        second = next_batches(loader, None, 4)
    assert numpy.random.get_state()[1].tolist() == numpy_state
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert [first.order.of(n) for n in range(5)] == [second.order.of(n) for n in range(5)]
    assert first.order.of(4) is None
    # and the run has the same ones
    for made, fed in zip(first.batches, loader, strict=True):
        assert made.is_fed(fed)
        assert not made.is_fed({**fed, "labels": fed["labels"] + 1})


def test_a_generator_of_the_sampler_stays_as_it_was(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, accelerator_config={"use_seedable_sampler": False})
    generator = torch.Generator().manual_seed(7)
    trainer._get_train_sampler = lambda dataset=None: RandomSampler(rows, generator=generator)
    loader, state = trainer.get_train_dataloader(), generator.get_state()
    with undisturbed(None):
        made = next_batches(loader, None, 4)
    assert torch.equal(generator.get_state(), state)
    assert all(batch.is_fed(fed) for batch, fed in zip(made.batches, loader, strict=True))


def test_random_numbers_of_a_collator_stay_as_they_were(base: Path, rows: Rows, tmp_path: Path) -> None:
    ids = [{"input_ids": row["input_ids"]} for row in rows]
    trainer = make_trainer(base, ids, tmp_path, train_sampling_strategy="sequential")
    collator = DataCollatorForLanguageModeling(trainer.processing_class, mlm=False, seed=5)
    trainer.data_collator = collator
    loader, before = trainer.get_train_dataloader(), dict(vars(collator))
    with undisturbed(None):
        assert len(next_batches(loader, None, 2).batches) == 2
    assert vars(collator) == before
    collator.generator = torch.Generator()
    assert "has random numbers of its own" in next_batches(loader, None, 2).reason


class Lazy(IterableDataset[Any]):
    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rows)


@pytest.mark.parametrize(
    ("wrapped", "is_made"),
    [
        (lambda rows: Subset(rows, [3, 1, 2, 0]), True),
        (lambda rows: ConcatDataset([rows[:2], rows[2:]]), True),
        (lambda rows: Subset(NotedRows(rows), [3, 1, 2, 0]), False),
        (lambda rows: ConcatDataset([NotedRows(rows), rows]), False),
        (Lazy, False),
    ],
    ids=["part", "parts", "part of own rows", "parts with own rows", "stream"],
)
def test_only_rows_in_memory_are_read_before_the_run(
    wrapped: Any, is_made: bool, base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, wrapped(copy.deepcopy(rows)), tmp_path)
    found = next_batches(trainer.get_train_dataloader(), None, 2)
    assert (len(found.batches) == 2, not found.reason) == (is_made, is_made)


def test_a_transform_of_the_users_is_called_by_the_run_alone(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    trainer.train_dataset.set_transform(lambda columns: columns)
    assert "a look at a row of a Dataset" in next_batches(trainer.get_train_dataloader(), None, 2).reason


def test_a_batch_that_differs_from_the_one_made_before_is_judged_itself(
    base: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(base, rows, tmp_path, max_steps=2, train_sampling_strategy="sequential")
    made = guard(trainer, on_finding="warn")
    own = trainer.training_step

    def changes(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        inputs["labels"] = inputs["input_ids"].clone()
        return own(model, inputs, *given, **named)

    trainer.training_step = changes
    trainer.train()
    assert {("ML543", f"train_dataset[{n}]") for n in range(8)} <= errors_of(made.verdict)
    assert "a batch is not the one that was made before the run" in str(made.verdict)
    assert len(losses_of(trainer)) == 2


class OwnError(Exception):
    """An exception of the user's."""


def test_an_exception_of_the_dataset_is_raised_as_itself(base: Path, rows: Rows, tmp_path: Path) -> None:
    def note(index: int) -> None:
        if index == 5:
            raise OwnError("no such picture")

    trainer = make_trainer(base, NotedRows(rows, note), tmp_path)
    guard(trainer)
    with pytest.raises(OwnError, match="picture") as caught:
        trainer.train()
    assert caught.traceback[-1].name == "note"


def test_an_exception_of_a_collator_that_is_called_before_names_its_rows(
    base: Path, rows: Rows, tmp_path: Path
) -> None:
    broken = [{**row, "labels": [*row["labels"][:-1], 10**30]} if n == 1 else row for n, row in enumerate(rows)]
    trainer = make_trainer(
        base, [{"input_ids": [1, 2], "labels": [1, 2]}], tmp_path, train_sampling_strategy="sequential"
    )
    trainer.train_dataset = broken
    with pytest.raises((OverflowError, ValueError, RuntimeError)) as caught:
        begin(trainer)
    assert "the collator, given train_dataset[0], train_dataset[1]" in caught.value.__notes__[0]
