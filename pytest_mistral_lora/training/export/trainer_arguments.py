"""The arguments of transformers' Trainer for a run, which several trainers take by name."""

from __future__ import annotations

from typing import Any

from pytest_mistral_lora.training.export.bridge import ADAPTER, ExportedRun
from pytest_mistral_lora.training.loop import optimizer_name, optimizer_settings, schedule_settings


def trainer_arguments(run: ExportedRun) -> dict[str, Any]:
    """Return the arguments of transformers' Trainer for a run."""
    training = run.recipe.training
    settings = {
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
        "logging_steps": training.logging_steps,
        "report_to": list(training.report_to) or "none",
        "save_strategy": "steps" if training.checkpoint_steps else "no",
    }
    if training.checkpoint_steps:
        settings["save_steps"] = training.checkpoint_steps
    if run.eval_steps:
        settings |= {"eval_strategy": "steps", "eval_steps": run.eval_steps}
        settings["per_device_eval_batch_size"] = run.rows_at_once
    return settings
