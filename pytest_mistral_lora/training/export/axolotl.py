"""Axolotl: `axolotl train axolotl.yaml`, on rows with `input_ids` and `labels`, which it takes as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_mistral_lora.training.arguments import optimizer_name, optimizer_settings, schedule_settings
from pytest_mistral_lora.training.export.bridge import ADAPTER, ROWS, Bridge, Run
from pytest_mistral_lora.training.export.rows import write_json_lines

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
_LEAST_WARMUP = 2
"""Axolotl makes two steps of a warm-up of one."""


def _settings(run: Run) -> dict[str, Any]:
    return {**_model(run), **_adapter(run), **_data(run), **_optimisation(run), **_bookkeeping(run)}


def _model(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"base_model": run.model}
    if run.revision:
        found["revision_of_model"] = run.revision
    return found | {"bf16": run.precision == "bf16", "fp16": run.precision == "fp16", "tf32": False}


def _adapter(run: Run) -> dict[str, Any]:
    lora, quantized = run.recipe.lora, bool(run.recipe.base.quantization)
    found = {
        "adapter": "qlora" if quantized else "lora",
        "load_in_4bit": quantized,
        "lora_r": lora.r,
        "lora_alpha": run.alpha,
        "lora_dropout": lora.dropout,
        "lora_target_modules": list(lora.target_modules),
        "peft_use_rslora": lora.rslora,
        "peft_use_dora": lora.dora,
    }
    return found | ({"lora_modules_to_save": list(lora.modules_to_save)} if lora.modules_to_save else {})


def _data(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {
        "datasets": [_file("train")],
        "val_set_size": 0,
        "dataset_prepared_path": "prepared",
        "shuffle_merged_datasets": False,
        "sequence_len": run.recipe.training.max_length,
        "excess_length_strategy": "raise",
        "min_sample_len": 1,
        "sample_packing": False,
        "pad_to_sequence_len": False,
    }
    return found | ({"test_datasets": [_file("test")]} if run.eval_steps else {})


def _file(name: str) -> dict[str, Any]:
    # no type: it is for rows that are to be encoded
    return {"path": f"{ROWS}/{name}.jsonl", "ds_type": "json", "split": "train", "type": None}


def _optimisation(run: Run) -> dict[str, Any]:
    training = run.recipe.training
    schedule = schedule_settings(training)
    found = {
        "max_steps": run.steps,
        "num_epochs": _epochs(run),
        "micro_batch_size": run.rows_at_once,
        "gradient_accumulation_steps": run.accumulation,
        **optimizer_settings(training),
        "lr_scheduler": schedule["lr_scheduler_type"],
        "warmup_steps": run.warmup_steps,
        "optimizer": optimizer_name(training, run.precision),
        "gradient_checkpointing": training.activation_checkpointing,
    }
    if "lr_scheduler_kwargs" in schedule:
        found["lr_scheduler_kwargs"] = schedule["lr_scheduler_kwargs"]
    return found | (_LIGER if training.kernels == "liger" else {})


def _epochs(run: Run) -> float:
    """Return enough passes for all steps: Axolotl ends a run at what comes first."""
    rows = len(run.data.train.rows)
    return max(1, -(-run.steps * run.recipe.training.batch_size // rows) + 1)


def _bookkeeping(run: Run) -> dict[str, Any]:
    training = run.recipe.training
    found: dict[str, Any] = {"output_dir": ADAPTER, "logging_steps": training.logging_steps}
    found |= {"save_steps": training.checkpoint_steps} if training.checkpoint_steps else {"save_strategy": "no"}
    if run.eval_steps:
        found |= {"eval_strategy": "steps", "eval_steps": run.eval_steps, "eval_batch_size": run.rows_at_once}
    return found | {_LOGGERS[name]: True for name in training.report_to if name in _LOGGERS}


def _remarks(run: Run) -> Iterator[str]:
    if run.accumulation > 1:
        yield (
            f"Axolotl takes the mean of each of the {run.accumulation} micro-batches of a step, and then the mean of "
            "these; here it is one mean over all supervised tokens of the step. Where memory allows, set "
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
    versions="0.19",
    config="axolotl.yaml",
    command="axolotl train axolotl.yaml",
    settings=_settings,
    write_rows=write_json_lines,
    left_out={
        "training.order_seed": "the seed alone decides the order",
        "training.device": "it takes the GPU where there is one: hide it with CUDA_VISIBLE_DEVICES= for a CPU",
    },
    remarks=_remarks,
)
