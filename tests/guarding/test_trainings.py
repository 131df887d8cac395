"""Trainings that end before the guard has its batches, trainings after them, and the line of a run that goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from guarded_runs import chat_rows, encoded, errors_of, losses_of, make_trainer
from sampling import sampled
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from pytest_mistral_lora import GuardError, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.guarding import run_judge
from pytest_mistral_lora.guarding.steps import LOSS

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]
STEP = {"max_steps": 1, "gradient_accumulation_steps": 1}


class Stream(IterableDataset[Any]):
    """Rows without numbers."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def _lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("mistral guard: ")]


@pytest.mark.parametrize("on_finding", sampled(["stop", "warn"], {"stop"}))
def test_a_stream_that_ends_early_is_judged_as_far_as_it_goes(
    on_finding: Any, base: Path, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = encoded(oracle, chat_rows(6))
    trainer = make_trainer(base, Stream(rows), tmp_path, max_steps=3, gradient_accumulation_steps=1)
    callback = guard(trainer, on_finding=on_finding)
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    # all of them, not those of the last batch
    assert callback.verdict.facts["batches::encoded::labels"]["judged"] == 6
    [line] = _lines(capsys.readouterr().out)
    assert "6 rows judged (3 batches, " in line
    assert not trainer.model._forward_pre_hooks


class LongSteps(TrainerCallback):  # type: ignore[misc]
    """Moves a clock at each step."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.now += 1000


def test_the_seconds_of_a_stream_that_ends_early_are_the_guards(
    base: Path, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(base, Stream(encoded(oracle, chat_rows(6))), tmp_path, max_steps=3)
    clock = LongSteps()
    trainer.add_callback(clock)
    monkeypatch.setattr(run_judge, "time", clock)
    guard(trainer, batches=20)
    trainer.train()
    assert clock.now >= 1000
    [line] = _lines(capsys.readouterr().out)
    assert " in 0.00 s; " in line


def test_a_fault_at_the_end_of_a_stream_that_ends_early_is_reported(
    base: Path, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = encoded(oracle, chat_rows(4))
    rows[3]["labels"] = list(rows[3]["input_ids"])
    trainer = make_trainer(base, Stream(rows), tmp_path, max_steps=2, gradient_accumulation_steps=1)
    callback = guard(trainer, on_finding="warn")
    trainer.train()
    assert errors_of(callback.verdict) == {("ML543", "batches[1][1]")}
    assert _lines(capsys.readouterr().out) == []


def test_a_run_without_a_batch_is_not_checked(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(base, Stream([]), tmp_path, **STEP)
    callback = guard(trainer)
    # accelerate refuses an empty stream before the training ends
    with pytest.raises(ValueError, match="does not contain any data"):
        trainer.train()
    callback.on_train_end(trainer.args, trainer.state, trainer.control)
    assert callback.verdict is not None
    assert callback.verdict.not_checked["trainer::encoded::rows"] == "the run had no batch"
    [line] = _lines(capsys.readouterr().out)
    assert "the run had no batch" in line


def test_a_stream_is_not_checked_if_the_trainer_does_not_call_its_loss(
    base: Path, oracle: Oracle, tmp_path: Path
) -> None:
    trainer = make_trainer(base, Stream(encoded(oracle, chat_rows(4))), tmp_path, **STEP)

    def own_step(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()

    trainer.training_step = own_step
    callback = guard(trainer)
    trainer.train()
    assert callback.verdict is not None
    reason = "the trainer does not call its compute_loss"
    assert callback.verdict.not_checked["trainer::encoded::rows"] == reason


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_a_second_training_is_judged_anew(streamed: bool, base: Path, oracle: Oracle, tmp_path: Path) -> None:
    rows = encoded(oracle, chat_rows(4))
    trainer = make_trainer(base, Stream(rows) if streamed else rows, tmp_path, **STEP)
    callback = guard(trainer)
    trainer.train()
    first = callback.verdict
    assert first is not None
    assert first.ok
    rows[1]["labels"] = list(rows[1]["input_ids"])
    trainer.train_dataset = Stream(rows) if streamed else make_trainer(base, rows, tmp_path).train_dataset
    with pytest.raises(GuardError, match=r"ML543 batches\[0\]\[1\]" if streamed else r"ML543 train_dataset\[1\]"):
        trainer.train()
    assert callback.verdict is not first
    # and once more, after a training that was stopped
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    rows[1] |= encoded(oracle, chat_rows(2))[1]
    trainer.train_dataset = Stream(rows) if streamed else make_trainer(base, rows, tmp_path).train_dataset
    trainer.train()
    assert callback.verdict is not None
    assert callback.verdict.ok
    assert callback.verdict.facts["batches::encoded::labels"]["judged"] == (2 if streamed else 4)
    assert not trainer.model._forward_pre_hooks


def test_a_training_that_is_interrupted_leaves_no_watch_to_the_next(
    base: Path, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = encoded(oracle, chat_rows(8))
    broken = [*rows[:2], {"input_ids": [1], "labels": "none"}]
    trainer = make_trainer(base, Stream(broken), tmp_path, max_steps=3, gradient_accumulation_steps=1)
    guard(trainer)
    with pytest.raises((TypeError, ValueError)):
        trainer.train()
    trainer.train_dataset = Stream(rows)
    trainer.train()
    assert len(losses_of(trainer)) >= 3
    [line] = _lines(capsys.readouterr().out)
    assert "6 rows judged (3 batches, " in line


def test_a_green_guard_prints_one_line(
    base: Path, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(base, encoded(oracle, chat_rows(12)), tmp_path, **STEP | {"max_steps": 2})
    guard(trainer, batches=2)
    trainer.train()
    [line] = _lines(capsys.readouterr().out)
    assert "4 of 12 rows judged (2 batches, " in line
    assert "tokens with padding" in line
    assert " s; no finding; " in line
    assert "8 rows not judged" in line
    assert "not checked" not in line


def test_the_line_names_what_was_not_checked(
    base: Path, oracle: Oracle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make_trainer(base, encoded(oracle, chat_rows(4)), tmp_path, **STEP)
    trainer.processing_class = trainer.callback_handler.processing_class = None
    guard(trainer, tokenizer="spm-v3")
    trainer.train()
    [line] = _lines(capsys.readouterr().out)
    assert "4 of 4 rows judged" in line
    assert "not checked: bos-eos-unk: " in line
    assert "no processing_class" in line
    assert "template-of-base: " in line


def test_a_run_that_begins_again_with_smaller_batches_is_judged_again(
    base: Path, oracle: Oracle, tmp_path: Path
) -> None:
    rows = encoded(oracle, chat_rows(8))
    trainer = make_trainer(base, rows, tmp_path, **STEP, auto_find_batch_size=True, per_device_train_batch_size=4)
    own, sizes = trainer.training_step, []

    def runs_out(model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise RuntimeError("CUDA out of memory.")
        return own(model, inputs, *given, **named)

    trainer.training_step = runs_out
    callback = guard(trainer)
    trainer.train()
    assert sizes[0] == 4
    assert sizes[-1] <= 2
    assert callback.verdict is not None
    assert callback.verdict.ok
    assert "labels" in callback.verdict.facts[f"trainer::train::{LOSS}"]
    assert "compute_loss" not in vars(trainer)
