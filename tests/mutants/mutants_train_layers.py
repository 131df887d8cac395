"""Trainers with other layers, precision or checkpointing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gallery import Artifact, mutant
from peft import LoraConfig, get_peft_model
from trained_run import SOUND
from transformers import MistralForCausalLM, set_seed

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.callbacks import StopAtNonFinite


@mutant("ML315", "I18", says="RuntimeError")
def reentrant_checkpointing(artifact: Artifact) -> None:
    """Activation checkpointing is reentrant, and no input of the layers needs a gradient."""

    def checkpoint_activations(model: Any) -> None:
        base = model.get_base_model()
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": True})
        base.disable_input_require_grads()

    artifact["checkpoint_activations"] = checkpoint_activations


@mutant("ML315", "I18", says="tensors lose or gain a gradient")
def reentrant_first_layer(artifact: Artifact) -> None:
    """Only the first layer is checkpointed in the reentrant way: it gets no gradient, and the others train."""

    def checkpoint_activations(model: Any) -> None:
        first = model.get_base_model().model.layers[0]
        own = first.forward
        first.forward = lambda *given, **named: torch.utils.checkpoint.checkpoint(
            lambda *inner: own(*inner, **named), *given, use_reentrant=True
        )

    artifact["checkpoint_activations"] = checkpoint_activations


@mutant("ML319", "I50", says="'kproj'")
def any_name_that_matches(artifact: Artifact) -> None:
    """A target that matches nothing is left out, as PEFT does."""

    def adapted_layers(folder: Path, targets: Sequence[str]) -> Any:
        found = []
        for target in targets:
            try:
                found += SOUND["adapted_layers"](folder, [target])
            except RecipeError:
                continue
        return found

    artifact["adapted_layers"] = adapted_layers


def with_peft(model: Any, seed: int, **config: Any) -> Any:
    """Attach an adapter with PEFT alone, unchecked."""
    set_seed(seed)
    return get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, **config}))


@mutant("ML301.run ML307.adapter ML318 ML319 ML322", "I50", says="'q_proj': 2, 'v_proj': 2")
def targets_of_peft(artifact: Artifact) -> None:
    """The target modules do not reach PEFT, which has its own for Mistral; the run then refuses its adapter."""
    artifact["attach_adapter"] = lambda model, lora, layers, seed: with_peft(model, seed, lora_dropout=lora.dropout)


@mutant("ML301.answers ML302 ML305 ML311.mean ML318 ML321.precision", says="tensors lose or gain a gradient")
def head_that_is_trained(artifact: Artifact) -> None:
    """The head is trained beside the adapter, which alone is saved."""

    def attach_adapter(model: Any, *given: Any, **named: Any) -> Any:
        model = SOUND["attach_adapter"](model, *given, **named)
        model.get_base_model().lm_head.requires_grad_(True)
        return model

    artifact["attach_adapter"] = attach_adapter


@mutant("ML320", "I49", says="0 of 16 tensors move")
def frozen_adapter(artifact: Artifact) -> None:
    """An adapter that is loaded frozen goes through a run in which nothing moves."""

    def make_trainer(model: Any, *given: Any, **named: Any) -> Any:
        if any(parameter.requires_grad for parameter in model.parameters()):
            return SOUND["make_trainer"](model, *given, **named)
        first = next(model.parameters()).requires_grad_(True)
        trainer = SOUND["make_trainer"](model, *given, **named)
        first.requires_grad_(False)
        model.get_base_model().enable_input_require_grads()
        trainer.remove_callback(StopAtNonFinite)
        return trainer

    artifact["make_trainer"] = make_trainer


@mutant("ML321.precision ML322", "I44", says="trainable parameters are in torch.bfloat16")
def adapter_in_half_precision(artifact: Artifact) -> None:
    """The adapter has the base's precision; the run then refuses to save it."""

    def attach_adapter(model: Any, *given: Any, **named: Any) -> Any:
        model = SOUND["attach_adapter"](model, *given, **named)
        return model.to(next(model.parameters()).dtype)

    artifact["attach_adapter"] = attach_adapter


def loads(artifact: Artifact, **settings: Any) -> None:
    """Load the base with other settings."""

    def load_base(base: BaseFolder, precision: str, device: str) -> Any:
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        model = MistralForCausalLM.from_pretrained(base.path, **{"dtype": dtype, **settings})
        model.config.use_cache = False
        return model

    artifact["load_base"] = load_base


@mutant("ML321.precision", "I46", says="the base is in torch.bfloat16")
def precision_of_the_checkpoint(artifact: Artifact) -> None:
    """The base is loaded in the precision that the checkpoint is stored in."""
    loads(artifact, dtype="auto")


@mutant("ML321.window", "I57", says="the loaded model's window is 4096", slow=True)
def window_of_the_first_mistral(artifact: Artifact) -> None:
    """The window is the default of transformers, not the checkpoint's."""
    loads(artifact, sliding_window=4096)


@mutant("ML321.window", "I57", says="the loaded model's window is None")
def no_window(artifact: Artifact) -> None:
    """The checkpoint's window is left out."""
    loads(artifact, sliding_window=None)
