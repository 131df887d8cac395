"""The processes, devices, precision and libraries of a run.

The rank of a process comes from its launcher's environment; torch is imported only to look at a device.
"""

from __future__ import annotations

import os
import re
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from packaging.version import Version

from pytest_mistral_lora.checkpoint.devices import choose_device
from pytest_mistral_lora.errors import InputError, MachineError, RecipeError
from pytest_mistral_lora.places import NOWHERE, Place
from pytest_mistral_lora.records.manifest import parts

if TYPE_CHECKING:
    from pytest_mistral_lora.training.recipe import Recipe, Training


def device_count() -> int:
    """Return the number of processes that a launcher started for this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Return the number of this process among those of the run on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """Report whether this process writes the run's files and messages."""
    return int(os.environ.get("RANK", "0")) == 0


def engine() -> Literal["none", "ddp", "fsdp", "deepspeed"]:
    """Return the engine that a launcher distributes this run with."""
    # from the environment: before the Trainer is made, accelerate does not know it
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "deepspeed"
    return "ddp" if device_count() > 1 else "none"


def on_gpu(training: Training) -> bool:
    """Report whether the model runs on a GPU.

    Raises:
        MachineError: If the recipe asks for CUDA and the machine has no CUDA device.
    """
    return choose_device(training.device, place=NOWHERE.within("training", "device"), error=MachineError) == "cuda"


def precision_of(training: Training) -> Any:
    """Return `bf16`, `fp16` or `fp32`: the recipe's choice, or for `auto` the choice for this machine.

    Raises:
        RecipeError: If the recipe asks for fp16 on a CPU, which accelerate refuses.
    """
    if training.precision == "fp16" and not on_gpu(training):
        found = "'fp16', and the run is on the CPU"
        raise _without_gpu(training)(found, place=NOWHERE.within("training", "precision"), expected="fp32 or bf16")
    if training.precision != "auto":
        return training.precision
    if not on_gpu(training):
        return "fp32"
    import torch

    # an older GPU emulates bf16 slowly
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def _without_gpu(training: Training) -> type[RecipeError]:
    """Return the error for a setting that needs a GPU: `device: cpu` excludes it on every machine."""
    return RecipeError if training.device == "cpu" else MachineError


def device_of(training: Training) -> str:
    """Return the torch device on which this process loads the base: its own, or the CPU, from which FSDP shards it."""
    if engine() == "fsdp":
        return "cpu"
    return f"cuda:{local_rank()}" if on_gpu(training) else "cpu"


def memory_limit(device: str) -> int:
    """Return the memory that this process can have on a torch device, in bytes."""
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.mem_get_info(device)[1])
    import psutil

    return min([int(psutil.virtual_memory().total), *_limits_of_this_process()])


def _limits_of_this_process() -> list[int]:
    """Return the limits that a shell or a scheduler has set for this process, in bytes; none on Windows."""
    try:
        import resource  # of POSIX alone
    except ImportError:
        return []
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    return [limit for limit in limits if limit != resource.RLIM_INFINITY]


_PLACE = "accelerate's configuration"


def check_engine(recipe: Recipe) -> None:
    """Refuse a launcher's configuration that this trainer would not follow, or would follow wrongly.

    Raises:
        InputError: For FSDP1, FSDP's own activation checkpointing, DeepSpeed on a CPU, sharding in fp16, or sharding a
            4-bit base; and as for `on_gpu`.
    """
    if not on_gpu(recipe.training) and engine() == "deepspeed":
        raise InputError("DeepSpeed on a CPU", place=_PLACE, expected="GPUs; DDP and FSDP2 also run on CPUs")
    if engine() in ("fsdp", "deepspeed"):
        if recipe.training.precision == "fp16":
            raise InputError(
                f"fp16 with {engine()}", place=NOWHERE.within("training", "precision"), expected="bf16 or fp32, or DDP"
            )
        if recipe.base.quantization:
            found = f"{recipe.base.quantization} with {engine()}"
            raise InputError(
                found, place=NOWHERE.within("base", "quantization"), expected="a base that is not quantised, or DDP"
            )
    if engine() != "fsdp":
        return
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise InputError(f"fsdp_version: {version}", place=_PLACE, expected="fsdp_version: 2")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        # accelerate's wrapper recomputes a layer with other dropout than the first time
        raise InputError(
            "fsdp_activation_checkpointing: true",
            place=_PLACE,
            next_step="Leave it out, and set activation_checkpointing: true in the recipe's training.",
        )


def check_sharded_layers(model: Any) -> None:
    """Refuse a launcher's configuration that shards by a class of layers that the model lacks.

    Raises:
        InputError: With a class of layers that the model does not have.
    """
    named = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "") if engine() == "fsdp" else ""
    classes = {type(module).__name__ for module in model.modules()}
    for name in filter(None, map(str.strip, named.split(","))):
        if name not in classes:
            raise InputError(
                f"fsdp_transformer_layer_cls_to_wrap: {name}",
                place=_PLACE,
                expected=f"layers of this model, such as {', '.join(sorted(model._no_split_modules))}",
                next_step="Leave the key out: the decoder layers of any class are then found.",
            )


_BITSANDBYTES = "0.46.1"
_BITSANDBYTES_OPTIMIZERS_ON_CPU = "0.50"
_LIGER = "0.5"
"""Oldest versions that pass the tests."""


def require_environment(recipe: Recipe) -> None:
    """Check that this machine has the devices and libraries that the recipe needs.

    Raises:
        MachineError: If one of them is missing, or too old.
        RecipeError: If the recipe chooses the CPU and a setting that needs a GPU.
    """
    training, gpu = recipe.training, on_gpu(recipe.training)
    precision_of(training)
    if recipe.base.quantization:
        _require("bitsandbytes", _BITSANDBYTES, NOWHERE.within("base", "quantization"), recipe.base.quantization)
    if training.optimizer != "adamw":
        least = _BITSANDBYTES if gpu else _BITSANDBYTES_OPTIMIZERS_ON_CPU
        _require("bitsandbytes", least, NOWHERE.within("training", "optimizer"), training.optimizer)
    if training.kernels:
        if not gpu:
            found = f"{training.kernels!r} are kernels for a GPU, and the run is on the CPU"
            raise _without_gpu(training)(found, place=NOWHERE.within("training", "kernels"), expected="no kernels")
        _require("liger-kernel", _LIGER, NOWHERE.within("training", "kernels"), training.kernels)


def _require(package: str, least: str, place: Place, value: str) -> None:
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


IMAGE = "MISTRAL_LORA_IMAGE"
"""The variable with the digest of the container's image, which a container cannot ask for."""


def container_image() -> str:
    """Return the digest of the container's image, `sha256:…` or `NAME@sha256:…`; empty if the run was given none.

    Raises:
        MachineError: If the variable has another form: the manifest of the run would not be valid.
    """
    image = os.environ.get(IMAGE, "")
    if image and not re.fullmatch(parts()["environment"]["properties"]["image"]["pattern"], image):
        raise MachineError(
            repr(image),
            place=IMAGE,
            expected="sha256: and 64 lower-case hex digits, with or without NAME@ before it",
            next_step="Give what `docker image inspect --format '{{index .RepoDigests 0}}' IMAGE` prints.",
        )
    return image
