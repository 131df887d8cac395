"""What a run says of itself in its manifest, beside what is read from the finished folder."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pytest_mistral_lora.chat.rows import read_rows
from pytest_mistral_lora.records.hashing import sha256_file, sha256_ids, sha256_rows
from pytest_mistral_lora.records.identity import base_weights_sha256, sha256_files
from pytest_mistral_lora.training.data import RunData, Split
from pytest_mistral_lora.training.devices import device_count, on_gpu, precision_of
from pytest_mistral_lora.training.recipe import Recipe, Training
from pytest_mistral_lora.training.smoke import Completion

_PACKAGES = ("accelerate", "mistral-common", "peft", "safetensors", "tokenizers", "torch", "transformers")
_AS_GIVEN = ("learning_rate", "batch_size", "micro_batch_tokens", "max_length", "weight_decay", "max_grad_norm")


def run_facts(
    recipe: Recipe, base: Path, data: RunData, training: Mapping[str, Any], evaluation: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the parts of the manifest that do not come from the adapter folder."""
    return {
        "base": recipe.base.label,
        "revision": recipe.base.revision,
        "base_weights_sha256": recipe.base.weights_sha256 or base_weights_sha256(base),
        "dataset_sha256": sha256_files(recipe.data.train),
        "seed": recipe.training.seed,
        "dataset": _dataset(recipe, data),
        "masking": _masking(data.train),
        "lora": {**recipe.lora.model_dump(), "target_modules": sorted(recipe.lora.target_modules)},
        "training": training,
        "environment": environment(),
        "evaluation": evaluation,
    }


def _dataset(recipe: Recipe, data: RunData) -> dict[str, Any]:
    return {
        "files": [_data_file(recipe, path) for path in recipe.data.train],
        "eval_files": [_data_file(recipe, path) for path in recipe.data.eval],
        "held_out": recipe.data.held_out,
        "rows_sha256": sha256_rows(data.train.rows),
        "rows": len(data.train.rows),
        "held_out_rows": len(data.held_out.rows),
    }


def _data_file(recipe: Recipe, path: Path) -> dict[str, Any]:
    return {"path": recipe.path_as_written(path), "sha256": sha256_file(path), "rows": sum(1 for _ in read_rows(path))}


def _masking(train: Split) -> dict[str, Any]:
    return {
        "policy": "assistant turns of weight 1, to EOS",
        "tokens": sum(len(row.input_ids) for row in train.encoded),
        "supervised_tokens": train.supervised_tokens,
        "ids_sha256": sha256_ids(row.input_ids for row in train.encoded),
        "labels_sha256": sha256_ids(row.labels or () for row in train.encoded),
    }


def training_facts(
    training: Training, config: Mapping[str, Any], state: Any, *, resumed_from: int | None, relief: Sequence[str]
) -> dict[str, Any]:
    """Return the manifest's `training`.

    Args:
        training: The recipe's section.
        config: The base's `config.json`.
        state: The Trainer's state at the end.
        resumed_from: Step of the checkpoint that the run went on from, or None.
        relief: What was changed where memory ran out.
    """
    return {
        "steps": state.global_step,
        "epochs": float(state.epoch or 0),
        **{name: getattr(training, name) for name in _AS_GIVEN},
        "schedule": {
            "name": training.schedule,
            "warmup_steps": training.warmup_steps,
            "total_steps": state.max_steps,
        },
        "optimizer": "AdamW, betas 0.9 and 0.999, epsilon 1e-08",
        "devices": device_count(),
        "order_seed": training.seed if training.order_seed is None else training.order_seed,
        "precision": precision_of(training),
        "adapter_dtype": "float32",
        "device": "cuda" if on_gpu(training) else "cpu",
        "activation_checkpointing": training.activation_checkpointing,
        "sliding_window": config.get("sliding_window"),
        "memory_relief": list(relief),
        "resumed_from_step": resumed_from,
    }


def evaluation_facts(log: Sequence[Mapping[str, Any]], completions: Sequence[Completion]) -> list[dict[str, Any]]:
    """Return the manifest's `evaluation`: losses in nats a supervised token, and verdicts on generations."""
    losses = [line["loss"] for line in log if "loss" in line]
    held_out = [line["eval_loss"] for line in log if "eval_loss" in line]
    results: dict[str, Any] = {"training loss, first step": losses[0], "training loss, last log": losses[-1]}
    if held_out:
        results |= {"held-out loss, before": held_out[0], "held-out loss, after": held_out[-1]}
    measured = [{"command": "python -m pytest_mistral_lora.training recipe.yaml", "results": results}]
    if completions:
        verdicts = {
            "rows": len(completions),
            "equal to the row": sum(one.equal for one in completions),
            "stopped by EOS": sum(one.stop == "eos" for one in completions),
        }
        command = "python -m pytest_mistral_lora.training.smoke . --base BASE --rows ROWS.jsonl"
        measured.append({"command": command, "results": verdicts})
    return measured


def environment() -> dict[str, Any]:
    """Return where this process runs: the manifest's `environment`."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
