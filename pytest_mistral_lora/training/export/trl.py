"""TRL: `trl sft --config trl.yaml`. Messages with the training template where that is exact, else ids and labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.training_template import training_template
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.export.bridge import ROWS, TEMPLATE, Bridge
from pytest_mistral_lora.training.export.rows import messages, write_json_lines
from pytest_mistral_lora.training.export.run import Run
from pytest_mistral_lora.training.export.trainer_settings import trainer_settings

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
