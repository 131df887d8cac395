"""Steps that fp16 would overflow: PyTorch's own gradient scaler in the real loop, with infinities put in by hand."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import recipe_data, trainer_of, write_rows

from pytest_mistral_lora.errors import TrainingError
from pytest_mistral_lora.training.callbacks import skipped_steps
from pytest_mistral_lora.training.recipe import Recipe, parse_recipe
from pytest_mistral_lora.training.run_metadata import training_facts

Trainer = Any
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def scaled(base: Path, tmp_path: Path) -> MakeTrainer:
    """Make a trainer as for fp16, whose gradients overflow at some steps."""
    write_rows(tmp_path / "rows.jsonl")

    def make(overflows: set[int], **training: Any) -> tuple[Trainer, Recipe, dict[int, torch.Tensor]]:
        settings = {"steps": 6, "batch_size": 5, "logging_steps": 1, **training}
        recipe = parse_recipe(recipe_data(base, training=settings), folder=tmp_path)
        trainer = trainer_of(recipe, base, tmp_path)
        # accelerate refuses fp16 on a CPU; its loop takes a scaler all the same, and fp16 has the unfused optimizer
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        trainer.args.optim = "adamw_torch"
        values: dict[int, torch.Tensor] = {}
        parameter = next(p for name, p in trainer.model.named_parameters() if ".lora_B." in name)

        def overflow(gradient: torch.Tensor) -> torch.Tensor:
            step = trainer.state.global_step + 1
            values[step] = parameter.detach().clone()
            return gradient * float("inf") if step in overflows else gradient

        parameter.register_hook(overflow)
        return trainer, recipe, values

    return make


def test_a_step_that_overflows_is_skipped_counted_and_said(
    scaled: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, recipe, values = scaled({2, 4})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert skipped_steps(trainer.state.log_history) == [2, 4]
    assert [torch.equal(values[step], values[step + 1]) for step in (1, 2, 3, 4, 5)] == [
        False,
        True,
        False,
        True,
        False,
    ]
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pytest_mistral_lora")]
    assert [re.findall(r"\d+", line) for line in said] == [["2", "16", "1024"], ["4", "16", "512"]]
    assert all("overflowed in fp16" in line for line in said)
    facts = training_facts(recipe, None, trainer.state, resumed_from=None, memory_changes=[])
    assert facts["skipped_steps"] == 2
    assert facts["steps"] == 6


def test_the_learning_rate_waits_for_a_step_that_was_skipped(scaled: MakeTrainer) -> None:
    rates = {}
    for name, overflows in (("whole", set[int]()), ("skipped", {2})):
        trainer, _, _ = scaled(overflows, schedule="linear")
        trainer.train()
        rates[name] = trainer.lr_scheduler.get_last_lr()[0]
    assert rates["whole"] == 0
    assert rates["skipped"] == pytest.approx(0.01 / 6)


def test_without_an_overflow_a_scaler_changes_no_step(scaled: MakeTrainer) -> None:
    values = []
    for scale in (True, False):
        # without clipping: accelerate takes the scale out before it clips only where it set fp16 up itself
        trainer, _, found = scaled(set(), max_grad_norm=0)
        if not scale:
            trainer.accelerator.scaler = None
        trainer.train()
        values.append(found)
        assert skipped_steps(trainer.state.log_history) == []
    for step in range(1, 7):
        torch.testing.assert_close(values[0][step], values[1][step])


def test_the_scale_is_read_in_steps_that_overflow_alone(scaled: MakeTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _, _ = scaled({2, 5}, stop_at_grad_norm=1e9)
    scaler, read = trainer.accelerator.scaler, []
    sound = scaler.get_scale
    monkeypatch.setattr(scaler, "get_scale", lambda: read.append(trainer.state.global_step + 1) or sound())
    trainer.train()
    # the checkpoint after the last step has the scale, too
    assert [step for step in read if step <= 6] == [2, 5]


def test_a_run_of_skipped_steps_stops_the_training(scaled: MakeTrainer) -> None:
    trainer, _, _ = scaled({2, 4, 5, 6}, max_skipped_steps=3)
    with pytest.raises(TrainingError, match=r"3 steps .* overflowed in fp16.*step 6.*bf16 or fp32"):
        trainer.train()
    trainer, _, _ = scaled({1, 2, 4, 5}, max_skipped_steps=3)
    trainer.train()
    assert skipped_steps(trainer.state.log_history) == [1, 2, 4, 5]


def test_a_resumed_run_has_counted_what_came_before(scaled: MakeTrainer, tmp_path: Path) -> None:
    trainer, _, _ = scaled({1, 2, 3, 4, 5, 6}, max_skipped_steps=3, checkpoint_steps=2)
    with pytest.raises(TrainingError, match="step 3"):
        trainer.train()
    trainer, _, values = scaled({3, 4, 5, 6}, max_skipped_steps=5, checkpoint_steps=2)
    with pytest.raises(TrainingError, match=r"5 steps one after another.*step 5"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "work" / "checkpoint-2"))
    assert min(values) == 3
    assert skipped_steps(trainer.state.log_history) == [1, 2, 3, 4, 5]
    scales = [line["loss_scale"] for line in trainer.state.log_history if "loss_scale" in line]
    assert scales == [1024, 512, 256, 128, 64]


def test_without_a_scaler_an_infinite_gradient_still_stops_at_once(scaled: MakeTrainer) -> None:
    trainer, _, _ = scaled({2})
    trainer.accelerator.scaler = None
    with pytest.raises(TrainingError, match="a gradient is not finite at step 2"):
        trainer.train()
