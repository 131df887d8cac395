"""Trainers whose seeds, order, resumed runs or stops are not those of the laws."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gallery import Artifact, mutant
from trained_run import SOUND
from transformers import TrainerCallback, set_seed

from pytest_mistral_lora.training.callbacks import StopAtNonFinite


@mutant("ML307.adapter ML307.values ML318", "I35", says="the same seed gives other first values")
def seed_after_the_adapter(artifact: Artifact) -> None:
    """The adapter is drawn before the seed is set."""

    def attach_adapter(model: Any, lora: Any, layers: Any, *, seed: int) -> Any:
        model = SOUND["attach_adapter"](model, lora, layers, seed=int.from_bytes(os.urandom(4)))
        set_seed(seed)
        return model

    artifact["attach_adapter"] = attach_adapter


@mutant("ML307.values", "I35", says="another seed gives the same first values", slow=True)
def first_values_without_a_seed(artifact: Artifact) -> None:
    """The adapter's first values are always those of one seed."""

    def attach_adapter(model: Any, lora: Any, layers: Any, *, seed: int) -> Any:
        model = SOUND["attach_adapter"](model, lora, layers, seed=0)
        set_seed(seed)
        return model

    artifact["attach_adapter"] = attach_adapter


def remade(
    artifact: Artifact, change: Callable[[Any], Any], after: Callable[[Any], None] = lambda trainer: None
) -> None:
    """Make the trainer with other settings of training, and change it afterwards."""

    def make_trainer(model: Any, training: Any, *given: Any, **named: Any) -> Any:
        trainer = SOUND["make_trainer"](model, training.model_copy(update=change(training)), *given, **named)
        after(trainer)
        return trainer

    artifact["make_trainer"] = make_trainer


@mutant("ML307.order", "I35", says="another seed gives the same order", slow=True)
def order_without_a_seed(artifact: Artifact) -> None:
    """The rows always come in the order of one seed."""
    remade(artifact, lambda training: {"order_seed": 0})


@mutant("ML307.order", says="training.order_seed", slow=True)
def order_of_the_other_seed(artifact: Artifact) -> None:
    """The order's own seed is not looked at."""
    remade(artifact, lambda training: {"order_seed": training.seed})


@mutant("ML307.adapter ML307.order ML318", says="the same seed gives another order", slow=True)
def order_by_chance(artifact: Artifact) -> None:
    """The rows come in another order in every run."""
    remade(artifact, lambda training: {"order_seed": int.from_bytes(os.urandom(4))})


@mutant("ML307.adapter ML307.order ML307.values", says="another seed gives the same adapter")
def seed_that_decides_nothing(artifact: Artifact) -> None:
    """Whatever the seed, first values, dropout and order are those of seed 0."""
    artifact["attach_adapter"] = lambda model, lora, layers, seed: SOUND["attach_adapter"](model, lora, layers, seed=0)
    remade(artifact, lambda training: {"seed": 0, "order_seed": 0})


@mutant("ML318", says="broken off and resumed", slow=True)
def resumed_from_the_first_row(artifact: Artifact) -> None:
    """A resumed run begins its epoch again."""
    remade(artifact, lambda training: {}, lambda trainer: setattr(trainer.args, "ignore_data_skip", True))


@mutant("ML318")
def resumed_without_the_optimizer(artifact: Artifact) -> None:
    """A resumed run has the weights of the checkpoint, and a new optimizer."""
    remade(artifact, lambda training: {}, lambda trainer: _without_method(trainer, "_load_optimizer_and_scheduler"))


@mutant("ML318", slow=True)
def resumed_with_other_dropout(artifact: Artifact) -> None:
    """A resumed run does not restore the random state."""
    remade(artifact, lambda training: {}, lambda trainer: _without_method(trainer, "_load_rng_state"))


def _without_method(trainer: Any, name: str) -> None:
    setattr(trainer, name, lambda *given: None)


@mutant("ML322", "I45")
def steps_that_are_skipped(artifact: Artifact) -> None:
    """A gradient that is not finite counts as zero, as with a gradient scaler for half precision."""

    class Zero(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.nan_to_num_(0.0, 0.0, 0.0)

    def after(trainer: Any) -> None:
        trainer.remove_callback(StopAtNonFinite)
        trainer.add_callback(Zero())

    remade(artifact, lambda training: {}, after)
