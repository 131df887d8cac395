"""`guard(trainer).check()`: the first batch forward and backward, and no step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from guarded_runs import chat_rows, encoded, losses_of, make_trainer
from test_first_loss import _shifted_twice
from test_trainings import Stream
from transformers.training_args import OptimizerNames

from pytest_mistral_lora import GuardError, MistralGuard, guard
from pytest_mistral_lora.chat.oracle import Oracle
from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.guarding.steps import LOSS, PACKING

# PEFT, Trainer and multiprocessing warn of one another
pytestmark = pytest.mark.filterwarnings("ignore")

Rows = list[dict[str, Any]]


@pytest.fixture
def rows(oracle: Oracle) -> Rows:
    return encoded(oracle, chat_rows(8), messages=True)


def _state(trainer: Any) -> tuple[Any, ...]:
    model = trainer.model
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [parameter.grad for parameter in model.parameters()],
        [module.training for module in model.modules()],
        torch.get_rng_state(),
        len(trainer.accelerator._dataloaders),
        [len(module._forward_hooks) for module in model.modules()],
        "compute_loss" in vars(trainer),
    )


@pytest.mark.parametrize("is_stream", [False, True], ids=["rows", "stream"])
def test_a_sound_run_is_judged_with_its_gradient_and_nothing_changes(
    is_stream: bool, base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, Stream(rows) if is_stream else rows, tmp_path / "checked", max_steps=2)
    callback = guard(trainer)
    before = _state(trainer)
    verdict = callback.check()
    after = _state(trainer)
    assert verdict.ok, str(verdict)
    assert "labels" in verdict.facts[f"trainer::train::{LOSS}"]
    assert f"trainer::train::{PACKING}" not in verdict.not_checked
    assert verdict.facts["batches::encoded::labels"]["judged"] == (2 if is_stream else 8)
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert torch.equal(before[3], after[3])
    assert (before[1:3], before[4:]) == (after[1:3], after[4:])
    if not is_stream:
        # and the run is the same
        trainer.train()
        plain = make_trainer(base, rows, tmp_path / "plain", max_steps=2)
        plain.train()
        assert losses_of(trainer) == losses_of(plain)
        assert len(losses_of(trainer)) == 2


def test_layers_are_computed_anew_if_the_run_does_so(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path, gradient_checkpointing=True)
    decoder, seen = trainer.model.get_decoder(), []
    decoder.register_forward_hook(lambda module, given, output: seen.append(module.gradient_checkpointing))
    assert guard(trainer).check().ok
    assert (seen, decoder.gradient_checkpointing) == ([True], False)


def test_a_loss_of_other_tokens_is_found_without_a_step(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    trainer.compute_loss_func = _shifted_twice
    with pytest.raises(GuardError, match="ML326") as caught:
        guard(trainer).check()
    assert caught.value.verdict is not None
    assert trainer.state.global_step == 0
    assert "compute_loss" not in vars(trainer)
    assert not guard(trainer, on_finding="warn").check().ok


def test_the_rows_and_those_of_the_evaluation_are_judged(base: Path, rows: Rows, tmp_path: Path) -> None:
    broken = [{**row, "labels": [*row["labels"][:-1], -100]} if n == 3 else row for n, row in enumerate(rows)]
    for given, evaluation, place in ((broken, rows, "train_dataset[3]"), (rows, broken, "eval_dataset[3]")):
        trainer = make_trainer(base, given, tmp_path, evaluation=Dataset.from_list(evaluation))
        with pytest.raises(GuardError) as caught:
            guard(trainer).check()
        assert f"ML546 {place}" in str(caught.value)


def test_the_configuration_is_judged_as_the_run_will_have_it(base: Path, rows: Rows, tmp_path: Path) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    trainer.model.config.eos_token_id = 7  # `train` takes that of the tokenizer
    assert guard(trainer).check().ok
    assert trainer.model.config.eos_token_id == 7
    trainer.processing_class = None
    with pytest.raises(GuardError, match=r"ML217 model\.config"):
        guard(trainer, tokenizer="spm-v3").check()


def test_an_optimizer_that_moves_weights_in_the_backward_pass_is_refused(
    base: Path, rows: Rows, tmp_path: Path
) -> None:
    trainer = make_trainer(base, rows, tmp_path)
    trainer.args.optim = OptimizerNames.ADALOMO
    with pytest.raises(InputError, match="optim='adalomo'"):
        guard(trainer).check()


def test_a_guard_without_a_trainer_says_how_to_get_one() -> None:
    with pytest.raises(InputError, match=r"guard\(trainer\)\.check\(\)"):
        MistralGuard().check()
