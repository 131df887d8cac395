"""What TRL and LLaMA-Factory share: both take the arguments of transformers' Trainer by name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.arguments import optimizer_name, optimizer_settings, schedule_settings
from pytest_mistral_lora.training.export.bridge import ADAPTER, ROWS, TEMPLATE, Bridge, Run
from pytest_mistral_lora.training.export.rows import messages, write_json_lines


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


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _settings(run: Run) -> dict[str, Any]:
    return {**_model(run), **_adapter(run), **_data(run), **trainer_settings(run), **_memory(run)}


def _model(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"model_name_or_path": run.model}
    if run.revision:
        found["model_revision"] = run.revision
    found["dtype"] = _DTYPES[run.precision]
    if run.recipe.base.quantization:
        found |= {"load_in_4bit": True, "bnb_4bit_quant_type": run.recipe.base.quantization}
        found["use_bnb_nested_quant"] = True
    return found


def _adapter(run: Run) -> dict[str, Any]:
    lora = run.recipe.lora
    found = {
        "use_peft": True,
        "lora_r": lora.r,
        "lora_alpha": run.alpha,
        "lora_dropout": lora.dropout,
        "lora_target_modules": list(lora.target_modules),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
    }
    return found | ({"lora_modules_to_save": list(lora.modules_to_save)} if lora.modules_to_save else {})


def _data(run: Run) -> dict[str, Any]:
    found = {
        "dataset_name": ROWS,
        "dataset_train_split": "train",
        "dataset_test_split": "test",
        "max_length": run.recipe.training.max_length,
        "packing": False,
        "assistant_only_loss": run.as_messages,
    }
    return found | ({"chat_template_path": TEMPLATE} if run.as_messages else {})


def _memory(run: Run) -> dict[str, Any]:
    training = run.recipe.training
    return {
        "gradient_checkpointing": training.activation_checkpointing,
        "use_liger_kernel": training.kernels == "liger",
    }


def _write_rows(run: Run, folder: Path) -> None:
    if run.as_messages:
        write_json_lines(run, folder, messages)
        write_text(folder.parent / TEMPLATE, training_template(run.encoder.tokenizer))
    else:
        write_json_lines(run, folder)


def _remarks(run: Run) -> Iterator[str]:
    if run.recipe.base.quantization:
        yield "TRL trains the adapter of a 4-bit base in bf16; here it is float32."


TRL = Bridge(
    name="trl",
    title="TRL",
    versions="1.16",
    config="trl.yaml",
    command="trl sft --config trl.yaml",
    settings=_settings,
    write_rows=_write_rows,
    remarks=_remarks,
    takes_messages=True,
)
