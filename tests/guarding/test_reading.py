"""The guard reads in a copy of the process: state stays as it was, and what cannot cross is judged as it comes."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from guarded_runs import begin, chat_rows, encoded, errors_of, losses_of, make_trainer
from sampling import sampled_case
from torch.utils.data import Dataset, Sampler

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.guarding import process_copy
from pytest_mistral_lora.guarding.shared_state import shared_with_copy

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]
READ_GLOBALLY: list[int] = []


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8))


class Counter:
    """An object with a state."""

    def __init__(self) -> None:
        self.reads = 0

    def count(self) -> None:
        self.reads += 1


class NotedRows(Dataset[Any]):
    """Rows that note each read.

    Attributes:
        note: Notes it.
    """

    def __init__(self, rows: Rows, note: Callable[[int], Any]) -> None:
        self.rows, self.note = rows, note

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.note(index)
        return dict(self.rows[index])


class SlottedRows(Dataset[Any]):
    __slots__ = ("reads", "rows")

    def __init__(self, rows: Rows) -> None:
        self.rows, self.reads = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.reads += 1
        return dict(self.rows[index])


def _in_dict(rows: Rows, work: Path) -> tuple[Any, Callable[[], Any]]:
    state = {"reads": 0}
    return NotedRows(rows, lambda index: state.update(reads=state["reads"] + 1)), lambda: state["reads"]


def _in_closure(rows: Rows, work: Path) -> tuple[Any, Callable[[], Any]]:
    reads = 0

    def note(index: int) -> None:
        nonlocal reads
        reads += 1

    return NotedRows(rows, note), lambda: reads


def _in_object(rows: Rows, work: Path) -> tuple[Any, Callable[[], Any]]:
    counter = Counter()
    return NotedRows(rows, lambda index: counter.count()), lambda: counter.reads


def _in_slots(rows: Rows, work: Path) -> tuple[Any, Callable[[], Any]]:
    dataset = SlottedRows(rows)
    return dataset, lambda: dataset.reads


def _in_module(rows: Rows, work: Path) -> tuple[Any, Callable[[], Any]]:
    READ_GLOBALLY.clear()
    return NotedRows(rows, READ_GLOBALLY.append), lambda: len(READ_GLOBALLY)


def _in_generator(rows: Rows, work: Path) -> tuple[Any, Callable[[], Any]]:
    numbers = iter(range(1000))
    return NotedRows(rows, lambda index: next(numbers)), lambda: numbers.__reduce__()[2]


def _in_file(rows: Rows, work: Path) -> tuple[Any, Callable[[], Any]]:
    file = work / "lines.txt"
    file.write_text("a line\n" * 1000)
    opened = file.open("rb", buffering=0)
    return NotedRows(rows, lambda index: opened.readline()), opened.tell


# a copy of the process has each of them; of a file, it shares the place with the run
@pytest.mark.parametrize(
    "made",
    [
        sampled_case(made, name=made.__name__, is_kept=made in (_in_closure, _in_file))
        for made in (_in_dict, _in_closure, _in_object, _in_slots, _in_module, _in_generator, _in_file)
    ],
)
def test_state_of_any_kind_stays_as_it_was(made: Any, base: Path, rows: Rows, tmp_path: Path) -> None:
    dataset, state = made(rows, tmp_path)
    before = state()
    trainer = make_trainer(base, dataset, tmp_path)
    verdict = begin(trainer).verdict
    assert verdict is not None
    assert verdict.facts["batches::encoded::labels"]["judged"] == 8
    assert state() == before
    # and the run does change it
    dataset[0]
    assert state() != before


class OrderedOnce(Sampler[int]):
    """An order that goes on from reading to reading."""

    def __init__(self, size: int) -> None:
        self.size, self.state = size, {"drawn": 0}

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        for number in range(self.size):
            self.state["drawn"] += 1
            yield (self.state["drawn"] + number) % self.size


def test_sampler_collator_and_random_states_stay_as_they_were(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, accelerator_config={"use_seedable_sampler": False})
    sampler, collated, pads = OrderedOnce(len(rows)), Counter(), trainer.data_collator

    def collate(items: list[Any]) -> Any:
        collated.count()
        torch.rand(1)
        return pads(items)

    trainer.data_collator = collate
    trainer._get_train_sampler = lambda dataset=None: sampler
    numpy_state, torch_state = numpy.random.get_state()[1].tolist(), torch.get_rng_state()
    begin(trainer)
    assert (sampler.state["drawn"], collated.reads) == (0, 0)
    assert numpy.random.get_state()[1].tolist() == numpy_state
    assert torch.equal(torch.get_rng_state(), torch_state)


class OwnError(Exception):
    """An exception that does not survive pickling: its arguments are not those of its class."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"{row}: {reason}")


def _raises(kind: str, at: int) -> Callable[[int], None]:
    def note(index: int) -> None:
        if index == at:
            raise OwnError(index, "no such picture") if kind == "own" else KeyError("picture")

    return note


@pytest.mark.parametrize(("kind", "error", "on_finding"), [("own", OwnError, "stop"), ("builtin", KeyError, "warn")])
def test_an_exception_of_the_dataset_is_raised_as_itself_with_its_row(
    kind: str, error: type[Exception], on_finding: Any, base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, NotedRows(rows, _raises(kind, 5)), tmp_path)
    with pytest.raises(error, match="picture") as caught:
        begin(trainer, on_finding=on_finding)
    assert "train_dataset[5]" in caught.value.__notes__[0]
    assert caught.traceback[-1].name == "note"


def test_an_exception_of_a_worker_is_raised_as_itself_with_its_row(base: Path, rows: Rows, tmp_path: Path) -> None:
    reads = Counter()

    def note(index: int) -> None:
        reads.count()
        _raises("builtin", 5)(index)

    trainer = make_trainer(base, NotedRows(rows, note), tmp_path, dataloader_num_workers=1)
    with pytest.raises(KeyError) as caught:
        begin(trainer)
    assert "train_dataset[5]" in caught.value.__notes__[0]
    assert "in note" in caught.value.__notes__[1]
    assert reads.reads == 0


def test_an_exception_of_the_collator_names_its_rows(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, train_sampling_strategy="sequential")

    def collate(items: list[Any]) -> Any:
        raise ZeroDivisionError("no rows")

    trainer.data_collator = collate
    with pytest.raises(ZeroDivisionError) as caught:
        begin(trainer)
    assert "collator" in caught.value.__notes__[0]
    assert " train_dataset[0], train_dataset[1]" in caught.value.__notes__[0]


def _only_here(index: int) -> None:
    if multiprocessing.parent_process() is not None:
        raise RuntimeError("the handle belongs to another process")


def _ends(index: int) -> None:
    if multiprocessing.parent_process() is not None:
        os._exit(3)


def _waits(index: int) -> None:
    if multiprocessing.parent_process() is not None:
        time.sleep(60)


@pytest.mark.parametrize(
    ("note", "words"),
    [(_only_here, "RuntimeError in a second process"), (_ends, "ended early"), (_waits, "gave nothing for 1 s")],
    ids=["handle", "end", "wait"],
)
def test_rows_that_cannot_be_read_in_a_copy_are_judged_as_they_come(
    note: Any,
    words: str,
    base: Path,
    rows: Rows,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(process_copy, "_PATIENCE", 1.0)
    trainer = make_trainer(base, NotedRows(rows, note), tmp_path, max_steps=2)
    callback = guard(trainer, batches=2)
    trainer.train()
    assert len(losses_of(trainer)) == 2
    assert callback.verdict is not None
    assert callback.verdict.ok
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mistral guard: ")]
    assert words in line
    assert "4 of 8 rows judged" in line
    assert "4 rows not judged" in line


def test_a_fault_of_rows_that_come_is_found(base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = encoded(oracle, chat_rows(8))
    rows[2]["labels"] = list(rows[2]["input_ids"])
    settings = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    faulty = make_trainer(base, NotedRows(rows, _only_here), tmp_path, **settings)
    guard(faulty)
    with pytest.raises(GuardError, match=r"ML543 batches\[1\]\[0\]"):
        faulty.train()


def test_memory_for_several_processes_is_not_changed(base: Path, rows: Rows, tmp_path: Path) -> None:
    reads = multiprocessing.get_context("fork").Value("i", 0)

    def note(index: int) -> None:
        reads.value += 1

    trainer = make_trainer(base, NotedRows(rows, note), tmp_path, max_steps=1)
    callback = guard(trainer, batches=1)
    begin(trainer)
    assert reads.value == 0
    trainer.train()
    assert reads.value > 0
    assert errors_of(callback.verdict) == set()
    assert "shared memory" in str(callback.verdict)


class Held:
    """Holds an object."""

    def __init__(self, held: Any) -> None:
        self.held = {"in": [held]}


def test_what_a_copy_shares_is_named(tmp_path: Path) -> None:
    mapped = numpy.memmap(tmp_path / "mapped.bin", dtype="int32", mode="w+", shape=(4,))
    opened = socket.socket()
    thread = threading.Thread(target=time.sleep, args=(0.2,))
    thread.start()
    shared = {
        "a socket": opened,
        "a tensor in shared memory": torch.zeros(2).share_memory_(),
        "a thread": thread,
        "a file that is mapped into memory for writing": numpy.asarray(mapped)[1:],
        "a lock between processes": multiprocessing.get_context("fork").Lock(),
    }
    try:
        assert [shared_with_copy([Held(value)]) for value in shared.values()] == list(shared)
        assert shared_with_copy([lambda: opened]) == "a socket"
    finally:
        opened.close()
        thread.join()


def test_what_a_copy_has_for_itself_is_not_named(rows: Rows, tmp_path: Path) -> None:
    (tmp_path / "mapped.bin").write_bytes(bytes(16))
    mapped = numpy.memmap(tmp_path / "mapped.bin", dtype="int32", mode="r")
    assert shared_with_copy([Held(numpy.asarray(mapped))]) == ""
    own = [torch.zeros(2), numpy.zeros(2), threading.Lock(), torch.Generator(), rows, Counter(), {1}, iter(rows)]
    assert shared_with_copy([Held(value) for value in own]) == ""
    assert shared_with_copy([NotedRows(rows, _raises("own", 1)), OrderedOnce(3)]) == ""
