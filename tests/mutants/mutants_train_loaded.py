"""Runs of another trainer whose model is not what it says of itself, or does not move as it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gallery import Artifact, mutant
from guarded_runs import lora_model
from peft import LoraConfig, get_peft_model
from transformers import MistralForCausalLM


def trains(artifact: Artifact, change: Callable[[Any], Any], **settings: Any) -> None:
    """Train a model that is changed before its trainer is made."""

    def model(base: Path) -> Any:
        made = lora_model(base, **settings)
        return change(made) or made

    artifact["guarded"] = {"model": model}


@mutant("ML321.scale", says="is multiplied by 1")
def scaled_layers(artifact: Artifact) -> None:
    """The layers of the adapter have half of the scale that its configuration gives."""

    def change(model: Any) -> None:
        for module in model.modules():
            if hasattr(module, "scale_layer"):
                module.scale_layer(0.5)

    trains(artifact, change)


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


def grown_model(artifact: Artifact, **adapter: Any) -> None:
    """Train an adapter on a model of 29,000 tokens, whose embeddings were resized for the tokenizer."""

    def model(base: Path) -> Any:
        made = MistralForCausalLM.from_pretrained(base)
        made.resize_token_embeddings(29_000)
        made.save_pretrained(base.parent / "small")
        made = MistralForCausalLM.from_pretrained(base.parent / "small")
        made.resize_token_embeddings(32_768)
        config = {"r": 4, "target_modules": ["q_proj", "v_proj"], **adapter}
        return get_peft_model(made, LoraConfig(task_type="CAUSAL_LM", **config))

    artifact["guarded"] = {"model": model}


@mutant("ML329", says="are the same to the model")
def rows_that_nobody_trains(artifact: Artifact) -> None:
    """The embeddings were resized, the new rows are used, and they stay as they were drawn."""
    grown_model(artifact)


@mutant("ML303", says="1 of 8 trained tensors had no gradient")
def output_that_is_detached(artifact: Artifact) -> None:
    """A layer of the adapter is cut off from the loss."""

    def change(model: Any) -> None:
        [layer, *_] = [module for name, module in model.named_modules() if name.endswith("v_proj.lora_B.default")]
        own = layer.forward
        layer.forward = lambda *given: own(*given).detach()

    trains(artifact, change)


@mutant("ML303", says="the optimizer does not have")
def optimizer_of_the_base(artifact: Artifact) -> None:
    """The optimizer was made before the adapter."""

    def change(trainer: Any) -> None:
        base = [parameter for name, parameter in trainer.model.named_parameters() if "lora_" not in name]
        trainer.optimizer = torch.optim.AdamW(base, lr=1e-4)

    artifact["guarded"] = {"change": change}


class _DecaysEverything(torch.optim.AdamW):
    """An optimizer that decays each tensor of a model, and not only its own."""

    model: Any

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.99)
        return super().step(closure)


@mutant("ML302", says="the optimizer moved")
def optimizer_that_moves_the_base(artifact: Artifact) -> None:
    """The decay of weights reaches the frozen base."""

    def change(trainer: Any) -> None:
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        trainer.optimizer = _DecaysEverything(trained, lr=1e-4)
        trainer.optimizer.model = trainer.model

    artifact["guarded"] = {"change": change}


@mutant("ML320", "I49", says="the learning rate is 0 in each of the 3 steps")
def rate_of_zero(artifact: Artifact) -> None:
    """The learning rate is 0 from the first step to the last."""
    artifact["guarded"] = {"change": lambda trainer: setattr(trainer.args, "learning_rate", 0.0)}
