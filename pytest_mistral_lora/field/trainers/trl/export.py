"""The configuration of TRL for a recipe's run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_mistral_lora.checkpoint.tokenizers import training_template
from pytest_mistral_lora.errors import RecipeError
from pytest_mistral_lora.places import NOWHERE
from pytest_mistral_lora.records.files import write_text
from pytest_mistral_lora.training.export.bridge import (
    ROWS,
    TEMPLATE,
    Bridge,
    ExportedRun,
    message_lines,
    refuse_patterns,
    write_json_lines,
)
from pytest_mistral_lora.training.export.trainer_arguments import trainer_arguments

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _trl_settings(run: ExportedRun) -> dict[str, Any]:
    """Return the configuration.

    Raises:
        RecipeError: If the run goes on from an adapter, or layers differ in rank or alpha.
    """
    lora, training, quantization = run.recipe.lora, run.recipe.training, run.recipe.base.quantization
    refuse_patterns(run, "trl sft")
    if run.start:
        load = f"PeftModel.from_pretrained(base, {run.start!r}, is_trainable=True)"
        raise RecipeError(
            "trl sft makes a new adapter: it has no setting for one to go on from",
            place=NOWHERE.within("lora", "start"),
            next_step=f"Train here, or in a script of your own: SFTTrainer(model={load}, …), without peft_config.",
        )
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
        "lora_target_modules": _targets(run.targets),
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
    return {**settings, **trainer_arguments(run), **memory}


def _targets(names: list[str]) -> list[str]:
    """Return the names of layers: TRL takes a list of one name for a regular expression of full names."""
    return [rf"(.*\.)?{re.escape(names[0])}"] if len(names) == 1 else names


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
