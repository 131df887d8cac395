"""The devices, the precision and the distribution of a run, and the libraries that a recipe needs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from packaging.version import Version
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from pytest_mistral_lora.checkpoint.devices import choose_device
from pytest_mistral_lora.errors import InputError, MachineError, RecipeError
from pytest_mistral_lora.training.launch import engine, local_rank
from pytest_mistral_lora.training.recipe import Recipe, Training


def on_gpu(training: Training) -> bool:
    """Report whether the model runs on a GPU.

    Raises:
        MachineError: If the recipe asks for CUDA and there is none.
    """
    return choose_device(training.device, place="training.device", error=MachineError) == "cuda"


def precision_of(training: Training) -> Any:
    """Return `bf16`, `fp16` or `fp32`: the recipe's choice, or the choice for this machine if that is `auto`.

    Raises:
        RecipeError: If the recipe asks for fp16 on a CPU, which accelerate refuses.
    """
    if training.precision == "fp16" and not on_gpu(training):
        found = "'fp16', and the run is on the CPU"
        raise _without_gpu(training)(found, place="training.precision", expected="fp32 or bf16")
    if training.precision != "auto":
        return training.precision
    # an older GPU emulates bf16 slowly
    return "bf16" if on_gpu(training) and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _without_gpu(training: Training) -> type[RecipeError]:
    """Return the error for a setting that needs a GPU: `device: cpu` excludes one on every machine."""
    return RecipeError if training.device == "cpu" else MachineError


def device_of(training: Training) -> str:
    """Return the torch device on which this process loads the base: its own, or the CPU, from which FSDP shards it."""
    if engine() == "fsdp":
        return "cpu"
    return f"cuda:{local_rank()}" if on_gpu(training) else "cpu"


_PLACE = "accelerate's configuration"


def check_engine(recipe: Recipe) -> None:
    """Refuse a launcher's configuration that this trainer would not follow, or would follow wrongly.

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
        # accelerate's wrapper computes a layer again with other dropout than the first time
        raise InputError(
            "fsdp_activation_checkpointing: true",
            place=_PLACE,
            next_step="Leave it out, and set activation_checkpointing: true in the recipe's training.",
        )


def shard_on_cpu(accelerator: Any) -> bool:
    """Make accelerate shard with FSDP2 on CPUs, too; report whether this was necessary."""
    # accelerate takes every launch on CPUs for DDP, without a warning
    if engine() != "fsdp" or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return False
    for state in (PartialState(), accelerator.state):
        state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    return True


class GenerateTogether(TrainerCallback):  # type: ignore[misc]
    """Lets processes that shard a model generate with it."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Register `generate` as a forward pass."""
        # FSDP2 gathers weights in `forward` only, unless told otherwise; transformers does so from version 5 on
        is_wrapped = isinstance(model, FSDPModule)
        if is_wrapped and "generate" not in vars(model):
            register_fsdp_forward_method(model, "generate")


def is_sharded(model: torch.nn.Module) -> bool:
    """Report whether each process holds a part of the weights only, so that all must take part in each pass."""
    # ds_id is DeepSpeed's mark of a parameter that ZeRO-3 has sharded
    return any(isinstance(one, DTensor) or hasattr(one, "ds_id") for one in model.parameters())


def gather_parameters(parameters: list[torch.nn.Parameter]) -> AbstractContextManager[Any]:
    """Return a context in which parameters that ZeRO-3 has sharded are complete; every process must enter it."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(sharded)
    return context


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a complete tensor, gathered if FSDP2 has sharded it; every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


_BITSANDBYTES = "0.46.1"
_BITSANDBYTES_OPTIMIZERS_ON_CPU = "0.50"
_LIGER = "0.5"
"""Oldest versions with which the tests pass."""


def require_environment(recipe: Recipe) -> None:
    """Check that this machine has the devices and libraries that the recipe needs.

    Raises:
        MachineError: If one of them is missing, or too old.
        RecipeError: If the recipe chooses the CPU, and a setting that needs a GPU.
    """
    training, gpu = recipe.training, on_gpu(recipe.training)
    precision_of(training)
    if recipe.base.quantization:
        _require("bitsandbytes", _BITSANDBYTES, "base.quantization", recipe.base.quantization)
    if training.optimizer != "adamw":
        least = _BITSANDBYTES if gpu else _BITSANDBYTES_OPTIMIZERS_ON_CPU
        _require("bitsandbytes", least, "training.optimizer", training.optimizer)
        if training.optimizer.startswith("paged") and not gpu:
            found = f"{training.optimizer!r} pages out of a GPU, and the run is on the CPU"
            raise _without_gpu(training)(found, place="training.optimizer", expected="adamw or adamw_8bit")
    if training.kernels:
        if not gpu:
            found = f"{training.kernels!r} are kernels for a GPU, and the run is on the CPU"
            raise _without_gpu(training)(found, place="training.kernels", expected="no kernels")
        _require("liger-kernel", _LIGER, "training.kernels", training.kernels)


def _require(package: str, least: str, place: str, value: str) -> None:
    try:
        found = version(package)
    except PackageNotFoundError:
        found = ""
    if not found or Version(found) < Version(least):
        raise MachineError(
            f"{value!r} needs {package}, and {f'{found} is' if found else 'it is not'} installed",
            place=place,
            expected=f"{package} {least} or newer",
            next_step=f'Install it: pip install "{package}>={least}"',
        )
