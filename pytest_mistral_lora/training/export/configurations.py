"""The configurations of TRL, LLaMA-Factory and Axolotl for a run.

TRL and LLaMA-Factory take the arguments of transformers' Trainer by name; Axolotl has its own names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.export.bridge import (
    ADAPTER,
    ROWS,
    TEMPLATE,
    Bridge,
    ExportedRun,
    message_lines,
    write_dataset,
    write_json_lines,
)
from pytest_mistral_lora.training.loop import optimizer_name, optimizer_settings, schedule_settings

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_AXOLOTL_LOGGERS = {
    "wandb": "use_wandb",
    "mlflow": "use_mlflow",
    "tensorboard": "use_tensorboard",
    "comet_ml": "use_comet",
    "trackio": "use_trackio",
}
_AXOLOTL_LIGER = {
    "plugins": ["axolotl.integrations.liger.LigerPlugin"],
    "liger_rope": True,
    "liger_rms_norm": True,
    "liger_glu_activation": True,
}
# Axolotl turns a warm-up of one step into two steps.
_AXOLOTL_LEAST_WARMUP = 2


def _trainer_settings(run: ExportedRun) -> dict[str, Any]:
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


def _trl_settings(run: ExportedRun) -> dict[str, Any]:
    lora, training, quantization = run.recipe.lora, run.recipe.training, run.recipe.base.quantization
    settings: dict[str, Any] = {"model_name_or_path": run.model}
    if run.revision:
        settings["model_revision"] = run.revision
    settings["dtype"] = _DTYPES[run.precision]
    if quantization:
        # a 4-bit base is loaded with quantised scales here as well (bnb_4bit_use_double_quant)
        settings |= {"load_in_4bit": True, "bnb_4bit_quant_type": quantization, "use_bnb_nested_quant": True}
    settings |= {
        "use_peft": True,
        "lora_r": lora.r,
        "lora_alpha": run.alpha,
        "lora_dropout": lora.dropout,
        "lora_target_modules": run.targets,
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
    }
    if lora.modules_to_save:
        settings["lora_modules_to_save"] = list(lora.modules_to_save)
    settings |= {
        "dataset_name": ROWS,
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "max_length": training.max_length,
        # packed rows see one another under attention implementations that cannot keep them apart
        "packing": False,
        "assistant_only_loss": run.as_messages,
    }
    if run.as_messages:
        settings["chat_template_path"] = TEMPLATE
    memory = {
        "gradient_checkpointing": training.activation_checkpointing,
        "use_liger_kernel": training.kernels == "liger",
    }
    return {**settings, **_trainer_settings(run), **memory}


def _write_trl_rows(run: ExportedRun, folder: Path) -> None:
    if run.as_messages:
        write_json_lines(run, folder, message_lines)
        write_text(folder.parent / TEMPLATE, training_template(run.encoder.tokenizer))
    else:
        write_json_lines(run, folder)


def _trl_remarks(run: ExportedRun) -> Iterator[str]:
    if run.recipe.base.quantization:
        yield "TRL trains the adapter of a 4-bit base in bf16; here it is float32."


TRL = Bridge(
    name="trl",
    title="TRL",
    config="trl.yaml",
    command="trl sft --config trl.yaml",
    settings=_trl_settings,
    write_rows=_write_trl_rows,
    remarks=_trl_remarks,
    takes_messages=True,
)


def _llamafactory_settings(run: ExportedRun) -> dict[str, Any]:
    lora, training = run.recipe.lora, run.recipe.training
    settings: dict[str, Any] = {"model_name_or_path": run.model}
    if run.revision:
        settings["model_revision"] = run.revision
    if run.recipe.base.quantization:
        settings |= {"quantization_method": "bnb", "quantization_bit": 4, "quantization_type": "nf4"}
        settings["double_quantization"] = True
    settings |= {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": lora.r,
        "lora_alpha": run.alpha,
        "lora_dropout": lora.dropout,
        "lora_target": ",".join(run.targets),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
    }
    if lora.modules_to_save:
        settings["additional_target"] = ",".join(lora.modules_to_save)
    settings |= {
        "tokenized_path": ROWS,
        # it requires names of datasets, but does not read them if tokenized_path exists
        "dataset": "train",
        "dataset_dir": ROWS,
        "template": "empty",
        "cutoff_len": training.max_length,
        "packing": False,
    }
    if run.eval_steps:
        settings["eval_dataset"] = "validation"
    memory = {
        "disable_gradient_checkpointing": not training.activation_checkpointing,
        # as in this trainer: reentrant checkpointing loses gradients if no input of a layer needs one
        "use_reentrant_gc": False,
        "enable_liger_kernel": training.kernels == "liger",
    }
    return {**settings, **_trainer_settings(run), **memory}


def _llamafactory_remarks(run: ExportedRun) -> Iterator[str]:
    yield (
        "LLaMA-Factory copies the base's tokenizer beside the adapter. `template: empty` renders nothing here; do not "
        "take the adapter into its chat with that template."
    )


LLAMAFACTORY = Bridge(
    name="llamafactory",
    title="LLaMA-Factory",
    config="llamafactory.yaml",
    command="llamafactory-cli train llamafactory.yaml",
    settings=_llamafactory_settings,
    write_rows=write_dataset,
    remarks=_llamafactory_remarks,
)


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
    if lora.modules_to_save:
        settings["lora_modules_to_save"] = list(lora.modules_to_save)
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
        settings |= _AXOLOTL_LIGER
    settings |= {"output_dir": ADAPTER, "logging_steps": training.logging_steps}
    settings |= {"save_steps": training.checkpoint_steps} if training.checkpoint_steps else {"save_strategy": "no"}
    if run.eval_steps:
        settings |= {"eval_strategy": "steps", "eval_steps": run.eval_steps, "eval_batch_size": run.rows_at_once}
    return settings | {_AXOLOTL_LOGGERS[name]: True for name in training.report_to if name in _AXOLOTL_LOGGERS}


def _axolotl_remarks(run: ExportedRun) -> Iterator[str]:
    if run.accumulation > 1:
        yield (
            f"Axolotl takes the mean of each of the {run.accumulation} micro-batches of a step, and then the mean of "
            "these; here it is one mean over all supervised tokens of the step. If memory allows, set "
            f"micro_batch_size to {run.recipe.training.batch_size} and gradient_accumulation_steps to 1: then the two "
            "are the same. training.micro_batch_tokens decides it."
        )
    yield "On several devices Axolotl takes the mean loss of each."
    if run.warmup_steps == _AXOLOTL_LEAST_WARMUP - 1:
        yield f"Axolotl makes {_AXOLOTL_LEAST_WARMUP} steps of a warm-up of one."
    missing = [name for name in run.recipe.training.report_to if name not in _AXOLOTL_LOGGERS]
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
)

BRIDGES: Mapping[str, Bridge] = MappingProxyType({bridge.name: bridge for bridge in (TRL, AXOLOTL, LLAMAFACTORY)})
"""The runners that a recipe can be exported to, by name."""
