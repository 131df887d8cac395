"""Sharding by FSDP2 or DeepSpeed: what is refused, what accelerate has to be told, and gathering what is divided."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor

from pytest_mistral_lora.errors import InputError
from pytest_mistral_lora.training.devices import engine, on_gpu
from pytest_mistral_lora.training.recipe import Recipe

_PLACE = "accelerate's configuration"


def check_engine(recipe: Recipe) -> None:
    """Refuse what a launcher may ask for and this trainer would not do, or would do wrongly.

    Raises:
        InputError: For FSDP1, FSDP's own activation checkpointing, DeepSpeed on a CPU, sharding in fp16 or of a 4-bit
            base, and as for `on_gpu`.
    """
    if not on_gpu(recipe.training) and engine() == "deepspeed":
        raise InputError("DeepSpeed on a CPU", place=_PLACE, expected="GPUs; DDP and FSDP2 also run on CPUs")
    if engine() in ("fsdp", "deepspeed"):
        if recipe.training.precision == "fp16":
            raise InputError(f"fp16 with {engine()}", place="training.precision", expected="bf16 or fp32, or DDP")
        if recipe.base.quantization:
            found = f"{recipe.base.quantization} with {engine()}"
            raise InputError(found, place="base.quantization", expected="a base that is not quantised, or DDP")
    if engine() != "fsdp":
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(f"fsdp_version: {version}", place=_PLACE, expected="fsdp_version: 2")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        # it computes a layer again with other dropout than the first time
        raise InputError(
            "fsdp_activation_checkpointing: true",
            place=_PLACE,
            next_step="Leave it out, and set activation_checkpointing: true in the recipe's training.",
        )


def shard_on_cpu(accelerator: Any) -> bool:
    """Let accelerate shard with FSDP2 on CPUs, too, where it would run DDP without a word; say whether it was so."""
    if engine() != "fsdp" or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return True


def is_divided(model: torch.nn.Module) -> bool:
    """Say whether each process holds a part of the weights only, so that a pass is one of all processes."""
    return any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in model.parameters())


def gathered(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Return a context in which parameters that DeepSpeed's ZeRO-3 has divided are whole, in every process."""
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(divided)
    return context


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that FSDP2 has divided as a whole one; every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
