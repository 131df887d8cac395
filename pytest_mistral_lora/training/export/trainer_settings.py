"""What TRL and LLaMA-Factory share: both take the arguments of transformers' Trainer by name."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.training.arguments import optimizer_name, optimizer_settings, schedule_settings
from pytest_mistral_lora.training.export.bridge import ADAPTER
from pytest_mistral_lora.training.export.run import Run


def trainer_settings(run: Run) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer for a run."""
    training = run.recipe.training
    return {
        "output_dir": ADAPTER,
        "max_steps": run.steps,
        "per_device_train_batch_size": run.rows_at_once,
        "gradient_accumulation_steps": run.accumulation,
        **optimizer_settings(training),
        **schedule_settings(training),
        "warmup_steps": run.warmup_steps,
        "optim": optimizer_name(training, run.precision),
        "data_seed": training.seed_of_order,
        "bf16": run.precision == "bf16",
        "fp16": run.precision == "fp16",
        "use_cpu": training.device == "cpu",
        **_bookkeeping(run),
    }


def _bookkeeping(run: Run) -> dict[str, Any]:
    training = run.recipe.training
    found: dict[str, Any] = {
        "logging_steps": training.logging_steps,
        "report_to": list(training.report_to) or "none",
        "save_strategy": "steps" if training.checkpoint_steps else "no",
    }
    if training.checkpoint_steps:
        found["save_steps"] = training.checkpoint_steps
    if run.eval_steps:
        found |= {"eval_strategy": "steps", "eval_steps": run.eval_steps}
        found["per_device_eval_batch_size"] = run.rows_at_once
    return found
