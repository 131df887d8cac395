"""Loggers of transformers that get a run's log: only those that the recipe names."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import TrainingArguments

from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.training.devices import engine, on_gpu, precision_of
from pytest_mistral_lora.training.recipe import Training

_PACKAGES = {
    "azure_ml": "azureml-core",
    "comet_ml": "comet-ml",
    "flyte": "flytekit",
}
"""What to install for a logger, where it is not called as the logger is."""


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that transformers does not know, or that are not installed.

    Raises:
        RecipeError: Saying which are known, or what to install.
    """
    for index, name in enumerate(names):
        _logger(name, f"training.report_to[{index}]")


def loggers(names: Sequence[str], folder: Path, *, writes: bool) -> list[Any]:
    """Return the callbacks of the loggers.

    Args:
        names: What the recipe names.
        folder: Where TensorBoard's files go; the other loggers have settings of their own for that.
        writes: Whether this process is the one that logs.
    """
    found = [_logger(name, "training.report_to") for name in names]
    for name, callback in zip(names, found, strict=True):
        if name == "tensorboard" and writes:
            # its own choice is below the folder of checkpoints, which a finished run removes
            callback.tb_writer = callback._SummaryWriter(log_dir=str(folder))
    return found


def _logger(name: str, place: str) -> Any:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name not in INTEGRATION_TO_CALLBACK:
        known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
        raise RecipeError(f"{name!r}", place=place, expected=f"loggers that transformers knows: {known}")
    try:
        return INTEGRATION_TO_CALLBACK[name]()
    except (RuntimeError, ImportError) as error:
        raise RecipeError(
            f"{name!r} is not installed",
            place=place,
            next_step=f"Install it: pip install {_PACKAGES.get(name, name)}, or leave it out of report_to.",
        ) from error


Progress = Literal["none", "lines", "bar"]
"""How a run shows what has been done: not at all, a line for each line of the log, or a progress bar."""


def trainer_arguments(training: Training, *, has_held_out: bool, work: Path, progress: Progress) -> TrainingArguments:
    """Return the arguments of a run.

    Args:
        training: The recipe's section.
        has_held_out: Whether there are rows for a held-out loss.
        work: Folder for checkpoints.
        progress: How to show what has been done.

    Raises:
        RecipeError: If the device is not there.
    """
    # the recipe alone decides: transformers would take what a launcher, or an earlier run in this process, has set
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=training.steps or -1,
        num_train_epochs=training.epochs or 1.0,
        **optimizer_settings(training),
        **schedule_settings(training),
        **_warmup(training),
        # one batch of the loader is a step; micro-batches are made of it
        gradient_accumulation_steps=1,
        optim=optimizer_name(training, precision_of(training)),
        # an engine that shards would cast the adapter and its gradients, too
        bf16=precision_of(training) == "bf16" and engine() in ("none", "ddp"),
        fp16=precision_of(training) == "fp16",
        use_cpu=not on_gpu(training),
        **_bookkeeping(training, has_held_out, progress),
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu(training),
        ddp_find_unused_parameters=False,
    )
    # with several GPUs and no launcher, Trainer would split batches over threads (DataParallel)
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _bookkeeping(training: Training, has_held_out: bool, progress: Progress) -> dict[str, Any]:
    """Return what is logged, evaluated and kept, and when."""
    return {
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "eval_on_start": has_held_out,
        "eval_strategy": "steps" if has_held_out and training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "save_strategy": "steps",
        # without a number of steps, only the last one
        "save_steps": training.checkpoint_steps or sys.maxsize,
        "report_to": "none",
        "disable_tqdm": progress != "bar",
    }


def optimizer_settings(training: Training) -> dict[str, Any]:
    """Return what the optimizer is told, and the seed, under the names of transformers' arguments."""
    return {
        "learning_rate": training.learning_rate,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "adam_epsilon": training.epsilon,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "seed": training.seed,
    }


def schedule_settings(training: Training) -> dict[str, Any]:
    """Return what transformers calls the schedule of a recipe."""
    if training.schedule == "constant" and (training.warmup_steps or training.warmup_ratio):
        return {"lr_scheduler_type": "constant_with_warmup"}
    if training.min_learning_rate_ratio:
        kwargs = {"min_lr_rate": training.min_learning_rate_ratio}
        return {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": kwargs}
    return {"lr_scheduler_type": training.schedule}


def _warmup(training: Training) -> dict[str, Any]:
    # transformers 5 takes a number of steps below 1 for a fraction
    ratio = "warmup_ratio" if hasattr(TrainingArguments, "warmup_ratio") else "warmup_steps"
    return {ratio: training.warmup_ratio} if training.warmup_ratio else {"warmup_steps": training.warmup_steps}


def optimizer_name(training: Training, precision: str) -> str:
    """Return what transformers calls the optimizer of a recipe, at a precision of `bf16`, `fp16` or `fp32`."""
    if training.optimizer != "adamw":
        return training.optimizer
    # a fused kernel skips an overflowing step by itself, and accelerate would let the schedule go on
    return "adamw_torch" if precision == "fp16" else "adamw_torch_fused"
