"""Behind the first batches: the rows of the epoch before the first step, and some of the later steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guarded_runs import chat_rows, encoded, errors_of, losses_of, make_trainer
from test_first_loss import _shifted_twice
from torch.utils.data import IterableDataset

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.guarding import epoch
from pytest_mistral_lora.guarding.pace import LEAST, TRIAL, Pace

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]
FAULTY = 21
SETTINGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 12}


@pytest.fixture(scope="module")
def sound(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(24), messages=True)


@pytest.fixture
def rows(sound: Rows) -> Rows:
    return [dict(row) for row in sound]


def masked(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without a label at its EOS."""
    return {**row, "labels": [*row["labels"][:-1], -100]}


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("mistral guard: ")]


def test_a_row_behind_the_first_batches_stops_the_run_before_a_weight_moves(
    base: Path, rows: Rows, tmp_path: Path
) -> None:
    rows[FAULTY] = masked(rows[FAULTY])
    trainer = make_trainer(base, rows, tmp_path, **SETTINGS)
    guard(trainer, batches=1)
    with pytest.raises(GuardError, match="before a weight moves") as stopped:
        trainer.train()
    assert errors_of(stopped.value.verdict) == {("ML546", f"train_dataset[{FAULTY}]")}
    assert losses_of(trainer) == []
    # a run that does not come so far does not train on it
    short = make_trainer(
        base, rows, tmp_path, **{**SETTINGS, "max_steps": FAULTY // 2, "train_sampling_strategy": "sequential"}
    )
    verdict = guard(short, batches=1).check()
    assert (verdict.ok, verdict.facts["batches::encoded::labels"]["judged"]) == (True, FAULTY // 2 * 2)


def test_the_line_says_how_far_the_rows_were_judged(
    base: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    guard(make_trainer(base, rows, tmp_path, **SETTINGS), batches=1).check()
    [line] = lines(capsys)
    assert "24 of 24 rows judged (12 batches, " in line
    assert "not judged" not in line
    monkeypatch.setattr(epoch, "SECONDS", 0.0)
    guard(make_trainer(base, rows, tmp_path, **SETTINGS), batches=1).check()
    [line] = lines(capsys)
    assert "4 of 24 rows judged (2 batches, " in line
    assert "20 rows not judged: the time for them, 0 s, is over" in line
    monkeypatch.undo()
    rows[FAULTY]["labels"] = "none"  # which cannot be collated
    trainer = make_trainer(base, tuple(rows), tmp_path, **SETTINGS, train_sampling_strategy="sequential")
    assert guard(trainer, batches=1).check().ok
    [line] = lines(capsys)
    assert "20 of 24 rows judged" in line
    assert "4 rows not judged: TypeError: " in line
    assert f"raised by the collator, given train_dataset[20], train_dataset[{FAULTY}]" in line


class Stream(IterableDataset[Any]):
    """Rows that come once."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield from self.rows


def _masks_late(trainer: Any, rows: Rows) -> None:
    """Let a collator mask the EOS of the faulty row."""
    own = trainer.data_collator

    def collate(items: Rows) -> Any:
        return own([masked(item) if item["input_ids"] == rows[FAULTY]["input_ids"] else item for item in items])

    trainer.data_collator = collate


@pytest.mark.parametrize("of", ["a collator", "a stream"])
def test_a_later_batch_stops_the_run_at_its_step(of: str, base: Path, rows: Rows, tmp_path: Path) -> None:
    dataset: Any = rows
    if of == "a stream":
        dataset = Stream([*rows[:FAULTY], masked(rows[FAULTY]), *rows[FAULTY + 1 :]])
    settings = {**SETTINGS, "train_sampling_strategy": "sequential", "save_strategy": "steps", "save_steps": 8}
    trainer = make_trainer(base, dataset, tmp_path, **settings)
    if of == "a collator":
        _masks_late(trainer, rows)
    guard(trainer, batches=2, every=5)
    (tmp_path / "checkpoint-99").mkdir()  # of an earlier run
    with pytest.raises(GuardError) as stopped:
        trainer.train()
    place = f"train_dataset[{FAULTY}]" if of == "a collator" else "batches[10][1]"
    assert errors_of(stopped.value.verdict) == {("ML546", place)}
    words = f"at step 11, before its weights move; judged before it: step 6; the last checkpoint is {tmp_path}"
    assert words in str(stopped.value)
    assert f"{tmp_path / 'checkpoint-8'}" in str(stopped.value)
    assert len(losses_of(trainer)) == 10


def test_the_first_of_the_batches_of_a_step_is_judged(base: Path, rows: Rows, tmp_path: Path) -> None:
    settings = {**SETTINGS, "gradient_accumulation_steps": 2, "max_steps": 6}
    trainer = make_trainer(base, rows, tmp_path, **settings, train_sampling_strategy="sequential")
    _masks_late(trainer, rows)
    guard(trainer, batches=2, every=5)
    with pytest.raises(GuardError, match="at step 6, ") as stopped:
        trainer.train()
    assert errors_of(stopped.value.verdict) == {("ML546", f"train_dataset[{FAULTY}]")}


def test_a_loss_that_becomes_wrong_is_named_with_its_step(
    base: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(base, rows, tmp_path, **{**SETTINGS, "max_steps": 6})
    calls: list[int] = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        calls.append(len(calls))
        shifted = _shifted_twice(outputs, labels)
        return shifted if len(calls) > 3 else trainer.model.loss_function(outputs.logits, labels, vocab_size=32768)

    trainer.compute_loss_func = loss
    callback = guard(trainer, every=1, on_finding="warn")
    trainer.train()
    assert len(losses_of(trainer)) == 6
    assert callback.verdict is not None
    [finding] = callback.verdict.findings
    assert (finding.rule, str(finding.place)) == ("ML326", "compute_loss_func")
    assert finding.found.startswith("step 4 trains on labels that are shifted twice: ")
    assert lines(capsys)[-1] == "mistral guard: 5 later steps judged, one in 1"


def test_a_sound_run_is_judged_to_its_end(
    base: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(base, rows, tmp_path, **SETTINGS)
    callback = guard(trainer, batches=2, every=4)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    first, last = lines(capsys)
    assert "no finding" in first
    assert last == "mistral guard: 2 later steps judged, one in 4"


def test_a_guard_that_is_told_nothing_measures_how_often_it_judges(
    base: Path, rows: Rows, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(base, rows, tmp_path, **{**SETTINGS, "max_steps": TRIAL + 2})
    guard(trainer)
    trainer.train()
    assert lines(capsys)[-1].startswith("mistral guard: 1 later step judged, one in ")


def test_the_pace_is_a_function_of_the_number_of_the_step() -> None:
    asked = Pace(5, first=100)
    assert [step for step in range(90, 121) if asked.is_judged(step)] == [105, 110, 115, 120]
    measured = Pace(None, first=100)
    assert [step for step in range(90, 200) if measured.is_judged(step)] == [100 + TRIAL]
    for step in range(100, 100 + TRIAL + 1):
        measured.begin_step(step, 0.0)
        assert measured.every is None
        measured.end_step(step, 3600.0)
        assert (measured.every is not None) is (step == 100 + TRIAL)
    assert measured.measured(0.0) == LEAST
    assert measured.measured(3600.0) > 1000 * LEAST
    measured.every = 50
    assert [step for step in range(90, 220) if measured.is_judged(step)] == [108, 158, 208]
    assert measured.words == ", one in 50"
