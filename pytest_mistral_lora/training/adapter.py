"""Put LoRA on a base model: every requested layer or an error, seeded, float32, and nothing else trainable."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import set_seed

from pytest_mistral_lora.checkpoint.base import linear_layers, read_config
from pytest_mistral_lora.errors import RecipeError, TrainingError
from pytest_mistral_lora.training.recipe import Lora
from pytest_mistral_lora.training.sharding import gathered, whole

_PREFIX = "base_model.model."


def adapted_layers(folder: Path, targets: Sequence[str]) -> list[str]:
    """Return the dotted names of the base's layers that get an adapter, in model order, without loading weights.

    Raises:
        RecipeError: If a target is not a linear layer of every decoder layer. PEFT itself accepts a list of which any
            one name matches, and trains less than was asked for.
    """
    names = linear_layers(folder)
    layers = int(read_config(folder)["num_hidden_layers"])
    matched = {target: [name for name in names if name.endswith(f".{target}")] for target in targets}
    wrong = {target: len(found) for target, found in matched.items() if len(found) != layers}
    if wrong:
        have = sorted({name.rpartition(".")[2] for name in names if ".layers." in name})
        raise RecipeError(
            "; ".join(f"{target!r} matches {count or 'nothing'}" for target, count in wrong.items()),
            place="lora.target_modules",
            expected=f"linear layers that each of the {layers} decoder layers has: {', '.join(have)}",
        )
    wanted = {name for found in matched.values() for name in found}
    return [name for name in names if name in wanted]


def attach_adapter(model: Any, lora: Lora, layers: Sequence[str], *, seed: int) -> Any:
    """Return the base model with a new adapter; `model` is changed in place.

    The random generators are seeded here, before PEFT draws the first values, so the seed alone decides them.

    Args:
        model: The loaded base model.
        lora: The adapter's shape.
        layers: What `adapted_layers` returned.
        seed: Seed of the initial values, and of dropout afterwards.

    Raises:
        TrainingError: If the adapter is not exactly on `layers`, or anything else is trainable.
    """
    set_seed(seed)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=list(lora.target_modules),
        bias="none",
    )
    with peft_quiet():
        model = get_peft_model(model, config)
    _check_trainable(model, layers)
    return model


def adapter_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the adapter's tensors on the CPU, named as in `adapter_model.safetensors`.

    Where they are sharded, they are gathered: every process must call this. The base's weights are left where they are.
    """
    with gathered([parameter for parameter in model.parameters() if parameter.requires_grad]):
        # with "auto", PEFT asks the Hub for the base's configuration
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        return {name: whole(tensors[name].detach()).to("cpu", copy=True).contiguous() for name in sorted(tensors)}


def base_tensors(model: Any) -> dict[str, torch.Tensor]:
    """Return the base model's own tensors under the names of its checkpoint; not copies."""
    return {
        name.removeprefix(_PREFIX).replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def expected_names(layers: Sequence[str]) -> set[str]:
    """Return the tensor names that an adapter on these layers has: two for each layer."""
    return {f"{_PREFIX}{layer}.lora_{side}.weight" for layer in layers for side in "AB"}


@contextmanager
def peft_quiet() -> Iterator[None]:
    """Silence what PEFT says about transformers' renaming of checkpointing: no user can act on it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield


def _check_trainable(model: Any, layers: Sequence[str]) -> None:
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {name.replace(".default.", ".") for name in trainable}
    if found != expected_names(layers):
        odd = sorted(found ^ expected_names(layers))
        raise TrainingError(f"the trainable tensors are not the adapter's: {', '.join(odd[:5])}")
    for name, parameter in trainable.items():
        if parameter.dtype != torch.float32:
            raise TrainingError(f"{name} is {parameter.dtype}", expected="a float32 adapter")
