"""LLaMA-Factory: `llamafactory-cli train llamafactory.yaml`, on rows that it takes for its own tokenized ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_mistral_lora.training.export.bridge import ROWS, Bridge, Run
from pytest_mistral_lora.training.export.rows import write_dataset
from pytest_mistral_lora.training.export.trl import trainer_settings


def _settings(run: Run) -> dict[str, Any]:
    return {**_model(run), **_adapter(run), **_data(run), **trainer_settings(run), **_memory(run)}


def _model(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"model_name_or_path": run.model}
    if run.revision:
        found["model_revision"] = run.revision
    if run.recipe.base.quantization:
        found |= {"quantization_method": "bnb", "quantization_bit": 4, "quantization_type": "nf4"}
        found["double_quantization"] = True
    return found


def _adapter(run: Run) -> dict[str, Any]:
    lora = run.recipe.lora
    found = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": lora.r,
        "lora_alpha": run.alpha,
        "lora_dropout": lora.dropout,
        "lora_target": ",".join(lora.target_modules),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
    }
    return found | ({"additional_target": ",".join(lora.modules_to_save)} if lora.modules_to_save else {})


def _data(run: Run) -> dict[str, Any]:
    # it asks for names of datasets, and looks for none where tokenized_path is there; without it, it stops
    found = {
        "tokenized_path": ROWS,
        "dataset": "train",
        "dataset_dir": ROWS,
        "template": "empty",
        "cutoff_len": run.recipe.training.max_length,
        "packing": False,
    }
    return found | ({"eval_dataset": "validation"} if run.eval_steps else {})


def _memory(run: Run) -> dict[str, Any]:
    training = run.recipe.training
    return {
        "disable_gradient_checkpointing": not training.activation_checkpointing,
        "use_reentrant_gc": False,
        "enable_liger_kernel": training.kernels == "liger",
    }


def _remarks(run: Run) -> Iterator[str]:
    yield (
        "LLaMA-Factory copies the base's tokenizer beside the adapter. `template: empty` renders nothing here; do not "
        "take the adapter into its chat with that template."
    )


LLAMAFACTORY = Bridge(
    name="llamafactory",
    title="LLaMA-Factory",
    versions="0.9.5",
    config="llamafactory.yaml",
    command="llamafactory-cli train llamafactory.yaml",
    settings=_settings,
    write_rows=write_dataset,
    remarks=_remarks,
)
