"""The configuration of Axolotl for a recipe's run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_mistral_lora.field.trainers.axolotl.going_on import GOING_ON
from pytest_mistral_lora.training.export.bridge import ADAPTER, ROWS, Bridge, ExportedRun, write_json_lines
from pytest_mistral_lora.training.loop import optimizer_name, optimizer_settings, schedule_settings

_LOGGERS = {
    "wandb": "use_wandb",
    "mlflow": "use_mlflow",
    "tensorboard": "use_tensorboard",
    "comet_ml": "use_comet",
    "trackio": "use_trackio",
}
_LIGER = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
}
# Axolotl turns a warm-up of one step into two steps.
_LEAST_WARMUP = 2


def _axolotl_settings(run: ExportedRun) -> dict[str, Any]:
    lora, training, quantized = run.recipe.lora, run.recipe.training, bool(run.recipe.base.quantization)
    settings: dict[str, Any] = {"base_model": run.model}
    if run.revision:
        settings["revision_of_model"] = run.revision
    settings |= {
        "bf16": run.precision == "bf16",
        "fp16": run.precision == "fp16",
        # products of float32 stay in float32, as in this trainer
        "tf32": False,
        "adapter": "qlora" if quantized else "lora",
        "load_in_4bit": quantized,
        "lora_r": lora.r,
        "lora_alpha": run.alpha,
        "lora_dropout": lora.dropout,
        "lora_target_modules": run.targets,
        "peft_use_rslora": lora.rslora,
        "peft_use_dora": lora.dora,
    }
    for name, pattern in zip(("lora_rank_pattern", "lora_alpha_pattern"), run.patterns, strict=True):
        settings |= {name: pattern} if pattern else {}
    if lora.modules_to_save:
        settings["lora_modules_to_save"] = list(lora.modules_to_save)
    if run.start:
        settings[GOING_ON.start] = run.start
    # without `type`, which is for rows that Axolotl must encode
    files = {
        name: [{"path": f"{ROWS}/{name}.jsonl", "ds_type": "json", "split": "train", "type": None}]
        for name in ("train", "test")
    }
    settings |= {
        "datasets": files["train"],
        "val_set_size": 0,
        "dataset_prepared_path": "prepared",
        "shuffle_merged_datasets": False,
        "sequence_len": training.max_length,
        # by default it drops such rows; these rows are already cut or dropped, so another would be an error
        "excess_length_strategy": "raise",
        "min_sample_len": 1,
        "sample_packing": False,
        "pad_to_sequence_len": False,
    }
    if run.eval_steps:
        settings["test_datasets"] = files["test"]
    return {**settings, **_axolotl_optimization(run)}


def _axolotl_optimization(run: ExportedRun) -> dict[str, Any]:
    training, schedule = run.recipe.training, schedule_settings(run.recipe.training)
    settings = {
        "max_steps": run.steps,
        # Axolotl stops at the first of the two limits: one epoch more than the steps need leaves it to max_steps
        "num_epochs": max(1, -(-run.steps * training.batch_size // len(run.data.train.rows)) + 1),
        "micro_batch_size": run.rows_at_once,
        "gradient_accumulation_steps": run.accumulation,
        **optimizer_settings(training),
        "lr_scheduler": schedule["lr_scheduler_type"],
        "warmup_steps": run.warmup_steps,
        "optimizer": optimizer_name(training, run.precision),
        "gradient_checkpointing": training.activation_checkpointing,
    }
    if "lr_scheduler_kwargs" in schedule:
        settings["lr_scheduler_kwargs"] = schedule["lr_scheduler_kwargs"]
    if training.kernels == "liger":
        settings |= _LIGER
    settings |= {"output_dir": ADAPTER, "logging_steps": training.logging_steps}
    settings |= {"save_steps": training.checkpoint_steps} if training.checkpoint_steps else {"save_strategy": "no"}
    if run.eval_steps:
        settings |= {"eval_strategy": "steps", "eval_steps": run.eval_steps, "eval_batch_size": run.rows_at_once}
    return settings | {_LOGGERS[name]: True for name in training.report_to if name in _LOGGERS}


def _axolotl_remarks(run: ExportedRun) -> Iterator[str]:
    if run.accumulation > 1:
        yield (
            f"Axolotl takes the mean of each of the {run.accumulation} micro-batches of a step, and then the mean of "
            "these; here it is one mean over all supervised tokens of the step. If memory allows, set "
            f"micro_batch_size to {run.recipe.training.batch_size} and gradient_accumulation_steps to 1: then the two "
            "are the same. training.micro_batch_tokens decides it."
        )
    yield "On several devices Axolotl takes the mean loss of each."
    if run.warmup_steps == _LEAST_WARMUP - 1:
        yield f"Axolotl makes {_LEAST_WARMUP} steps of a warm-up of one."
    missing = [name for name in run.recipe.training.report_to if name not in _LOGGERS]
    if missing:
        yield f"Axolotl has no logger {', '.join(missing)} (training.report_to)."


AXOLOTL = Bridge(
    name="axolotl",
    title="Axolotl",
    config="axolotl.yaml",
    command="axolotl train axolotl.yaml",
    settings=_axolotl_settings,
    write_rows=write_json_lines,
    left_out={
        "training.order_seed": "the seed alone decides the order",
        "training.device": "it takes a GPU if there is one: set CUDA_VISIBLE_DEVICES= for a CPU",
    },
    remarks=_axolotl_remarks,
    objectives={"everything": {"train_on_inputs": True}},
)
