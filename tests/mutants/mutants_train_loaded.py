"""Runs of another trainer whose model is not what it says of itself, or does not move as it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gallery import Artifact, mutant
from guarded_runs import decay_everything, detach_last_layer, grown_model, lora_model, optimize_base, scale_layers
from peft import LoraConfig


def trains(artifact: Artifact, change: Callable[[Any], Any], **settings: Any) -> None:
    """Train a model that is changed before its trainer is made."""

    def model(base: Path) -> Any:
        made = lora_model(base, **settings)
        return change(made) or made

    artifact["guarded"] = {"model": model}


@mutant("ML321.scale", says="is multiplied by 1")
def scaled_layers(artifact: Artifact) -> None:
    """The layers of the adapter have half of the scale that its configuration gives."""

    trains(artifact, lambda model: scale_layers(model, 0.5))


@mutant("ML321.sizes", says="num_key_value_heads * head_dim is")
def heads_of_another_model(artifact: Artifact) -> None:
    """The configuration has other heads than the layers."""
    trains(artifact, lambda model: setattr(model.config, "num_key_value_heads", 1))


@mutant("ML321.ties", says="two tensors")
def head_that_is_untied(artifact: Artifact) -> None:
    """The configuration ties the head to the embeddings, and it is a tensor of its own."""
    trains(artifact, lambda model: setattr(model.config, "tie_word_embeddings", True))


@mutant("ML321.adapter", says="'default' and 'second' act")
def second_adapter_that_acts(artifact: Artifact) -> None:
    """A second adapter acts beside the one that is trained."""

    def change(model: Any) -> None:
        model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.base_model.set_adapter(["default", "second"])

    trains(artifact, change)


def with_theta(artifact: Artifact, theta: float) -> None:
    """Give the configuration another rope_theta after the model was loaded."""

    def change(model: Any) -> None:
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": theta}

    trains(artifact, change)


@mutant("ML328", says="frequency 1 of the rotary embedding")
def theta_that_is_changed_later(artifact: Artifact) -> None:
    """The configuration has another rope_theta than the layers."""
    with_theta(artifact, 5e6)


@mutant("ML329", says="are the same to the model")
def rows_that_nobody_trains(artifact: Artifact) -> None:
    """The embeddings were resized, the new rows are used, and they stay as they were drawn."""
    artifact["guarded"] = {"model": grown_model}


@mutant("ML303", says="1 of 8 trained tensors had no gradient")
def output_that_is_detached(artifact: Artifact) -> None:
    """A layer of the adapter is cut off from the loss."""

    trains(artifact, detach_last_layer)


@mutant("ML303", says="the optimizer does not have")
def optimizer_of_the_base(artifact: Artifact) -> None:
    """The optimizer was made before the adapter."""

    artifact["guarded"] = {"change": optimize_base}


@mutant("ML302", says="the optimizer moved")
def optimizer_that_moves_the_base(artifact: Artifact) -> None:
    """The decay of weights reaches the frozen base."""

    artifact["guarded"] = {"change": decay_everything}


@mutant("ML320", "I49", says="the learning rate is 0 in each of the 3 steps")
def rate_of_zero(artifact: Artifact) -> None:
    """The learning rate is 0 from the first step to the last."""
    artifact["guarded"] = {"change": lambda trainer: setattr(trainer.args, "learning_rate", 0.0)}
