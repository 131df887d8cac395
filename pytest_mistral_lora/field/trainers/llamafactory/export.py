"""The configuration of LLaMA-Factory for a recipe's run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pytest_mistral_lora.field.trainers.llamafactory.going_on import GOING_ON
from pytest_mistral_lora.training.export.bridge import ROWS, Bridge, ExportedRun, refuse_patterns, write_dataset
from pytest_mistral_lora.training.export.trainer_arguments import trainer_arguments


def _llamafactory_settings(run: ExportedRun) -> dict[str, Any]:
    """Return the configuration.

    Raises:
        RecipeError: If layers differ in rank or alpha.
    """
    lora, training = run.recipe.lora, run.recipe.training
    refuse_patterns(run, "LLaMA-Factory")
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
    if run.start:
        # with create_new_adapter it would merge the adapter, and train one beside it
        settings |= {GOING_ON.start: run.start, "create_new_adapter": False}
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
    return {**settings, **trainer_arguments(run), **memory}


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
    objectives={"last-answer": {"mask_history": True}, "everything": {"train_on_prompt": True}},
)
