"""The facts of a run that its manifest records: data, settings, results, libraries and code."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch

from pytest_mistral_lora.checkpoint.base_folder import BaseFolder
from pytest_mistral_lora.checkpoint.devices import torch_dtype
from pytest_mistral_lora.checkpoint.fp8 import DequantizedWeights
from pytest_mistral_lora.checkpoint.hashes import joint_sha256
from pytest_mistral_lora.records.data_stats import (
    held_out_hashes,
    masking_policy,
    removed_counts,
    retention_facts,
    token_stats,
)
from pytest_mistral_lora.records.gate import Gate
from pytest_mistral_lora.records.git import code_of
from pytest_mistral_lora.records.restated import PASSES, loss_results
from pytest_mistral_lora.training.adapter import lora_config, peft_targets
from pytest_mistral_lora.training.callbacks import skipped_steps
from pytest_mistral_lora.training.devices import container_image, device_count, on_gpu, precision_of
from pytest_mistral_lora.training.generate import Completion
from pytest_mistral_lora.training.recipe import Recipe, Training
from pytest_mistral_lora.training.rows.encoding import ReadFile
from pytest_mistral_lora.training.rows.loading import RunData
from pytest_mistral_lora.training.start_loss import start_facts

if TYPE_CHECKING:
    from pytest_mistral_lora.training.prepare import Preparation

_PACKAGES = (
    "accelerate",
    "bitsandbytes",
    "liger-kernel",
    "mistral-common",
    "peft",
    "pyarrow",
    "pytest-mistral-lora",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
)
_AS_GIVEN = ("learning_rate", "batch_size", "micro_batch_tokens", "max_length", "weight_decay", "max_grad_norm")


def run_facts(
    prepared: Preparation,
    state: Any,
    log: Sequence[Mapping[str, Any]],
    completions: Sequence[Completion],
    rates: Mapping[str, float],
    resumed_from: int | None,
    memory_changes: Sequence[str],
    unquantized: float | None,
    gate: Gate | None = None,
) -> dict[str, Any]:
    """Return the parts of the manifest that do not come from the adapter folder.

    Args:
        prepared: The recipe with its data.
        state: The Trainer's state at the end.
        log: Lines of the training log.
        completions: The answers generated after training.
        rates: Share of the answers that pass each format check, from 0 to 1.
        resumed_from: Step of the checkpoint that the run resumed from, or None.
        memory_changes: The settings that were changed because memory ran out.
        unquantized: The result of `unquantized_share` for the model.
        gate: The comparison of base and adapter; None without it.
    """
    recipe, base, data = prepared.recipe, prepared.base, prepared.data
    declared = recipe.declared()
    return {
        "base": recipe.base.label,
        "revision": recipe.base.revision,
        "base_weights_sha256": recipe.base.weights_sha256 or base.weights_sha256,
        "base_config": base.canonical_config,
        "dataset_sha256": joint_sha256([file.sha256 for file in data.files if not file.is_held_out]),
        "seed": recipe.training.seed,
        "dataset": _dataset(recipe, data, prepared.retention) | {"judgement": prepared.judgement.to_json()},
        "masking": {
            "policy": masking_policy(data.train.figures, [file.objective for file in data.files]),
            "objective": str(recipe.training.objective),
            **token_stats(data.train.figures),
        },
        "lora": {
            **recipe.lora.model_dump(exclude={"start"}, exclude_none=True),
            "target_modules": sorted(peft_targets(recipe.lora, prepared.layers)),
            "modules": sorted(prepared.layers),
            **_chosen_layers(recipe, prepared.layers),
            "modules_to_save": sorted(recipe.lora.modules_to_save),
            "seed": recipe.training.seed,
            **({} if prepared.start is None else {"start": start_facts(prepared, prepared.start, log)}),
        },
        "training": training_facts(
            recipe, base.facts.window, state, resumed_from=resumed_from, memory_changes=memory_changes
        )
        | ({"dequantized": dequantized} if (dequantized := dequantization(recipe.training, base)) else {})
        | ({} if unquantized is None else {"unquantized": round(unquantized, 4)}),
        "recipe": recipe.as_written(),
        "environment": {**environment(), "code": code_of(recipe.folder)},
        **declared,
        "evaluation": [*_evaluation(log, completions, rates, gate), *declared["evaluation"]],
    }


def _chosen_layers(recipe: Recipe, layers: Sequence[str]) -> dict[str, Any]:
    """Return the chosen layers, and the patterns as the adapter's configuration has them; empty without them."""
    chosen, config = recipe.lora.layers_to_transform, lora_config(recipe.lora, layers)
    patterns = {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    found = {"layers_to_transform": None if chosen is None else sorted(chosen), **patterns}
    return {key: value for key, value in found.items() if value}


def _data_file(recipe: Recipe, file: ReadFile) -> dict[str, Any]:
    entry = {"path": recipe.name_of(file.path), "sha256": file.sha256, "rows": file.rows}
    if file.objective != recipe.training.objective:
        entry["objective"] = str(file.objective)
    return {**entry, **({} if file.source is None else {"source": file.source})}


def _dataset(recipe: Recipe, data: RunData, retention: RunData | None) -> dict[str, Any]:
    train, held_out = data.train.figures, data.held_out.figures
    files: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for file in data.files:
        files[file.is_held_out].append(_data_file(recipe, file))
    retained: dict[str, Any] = {}
    if retention is not None:
        entries = [_data_file(recipe, file) for file in retention.files]
        retained = {"retention": {"files": entries, **retention_facts(retention.held_out.figures)}}
    return {
        "files": files[False],
        "eval_files": files[True],
        "held_out": recipe.data.held_out,
        "rows_sha256": train.sha256["rows"],
        "rows": train.tally.rows,
        "rows_used": train.tally.used,
        **removed_counts(train.tally),
        "held_out_rows": held_out.tally.used,
        **held_out_hashes(held_out),
        "held_out_removed": removed_counts(held_out.tally),
        **retained,
        "truncation": recipe.training.truncation,
        "unsupervised": recipe.training.unsupervised,
    }


def training_facts(
    recipe: Recipe, window: int | None, state: Any, *, resumed_from: int | None, memory_changes: Sequence[str]
) -> dict[str, Any]:
    """Return the manifest's `training`.

    Args:
        recipe: The recipe.
        window: Number of tokens that a token of the base sees; None for all tokens.
        state: The Trainer's state at the end.
        resumed_from: Step of the checkpoint that the run resumed from, or None.
        memory_changes: The settings that were changed because memory ran out.
    """
    training = recipe.training
    states = {"adamw": "", "adamw_8bit": ", 8-bit moments"}
    first, second = training.betas
    return {
        "steps": state.global_step,
        "epochs": float(state.epoch or 0),
        **{name: getattr(training, name) for name in _AS_GIVEN},
        "schedule": {
            "name": training.schedule,
            "warmup_steps": training.warmup(state.max_steps),
            "total_steps": state.max_steps,
            "min_learning_rate_ratio": training.min_learning_rate_ratio,
        },
        "optimizer": f"AdamW{states[training.optimizer]}, betas {first} and {second}, epsilon {training.epsilon:g}",
        "devices": device_count(),
        "order_seed": training.seed_of_order,
        "precision": precision_of(training),
        "quantization": recipe.base.quantization,
        "adapter_dtype": "float32",
        "skipped_steps": len(skipped_steps(state.log_history)),
        "device": "cuda" if on_gpu(training) else "cpu",
        "activation_checkpointing": training.activation_checkpointing,
        "kernels": training.kernels,
        "sliding_window": window,
        "memory_relief": list(memory_changes),
        "resumed_from_step": resumed_from,
    }


def dequantization(training: Training, base: BaseFolder) -> dict[str, Any] | None:
    """Return the manifest's `training.dequantized`: the layout of an FP8 base, and its bytes; None for full weights."""
    weights = base.weights
    itemsize = torch_dtype(precision_of(training)).itemsize
    return weights.facts(itemsize) if isinstance(weights, DequantizedWeights) else None


def _evaluation(
    log: Sequence[Mapping[str, Any]], completions: Sequence[Completion], rates: Mapping[str, float], gate: Gate | None
) -> list[dict[str, Any]]:
    """Return the manifest's `evaluation`: losses in nats a supervised token, and verdicts on generated answers."""
    command = "mistral-lora train recipe.yaml"
    measured: list[dict[str, Any]] = [{"command": command, "results": loss_results(log)}]
    if completions:
        verdicts = {
            "rows": len(completions),
            "equal to the row": sum(completion.equal for completion in completions),
            "stopped by EOS": sum(completion.stop == "eos" for completion in completions),
            **{f"{PASSES}{name}": rate for name, rate in rates.items()},
        }
        measured.append({"command": "mistral-lora smoke . --base BASE", "results": verdicts})
    if gate is not None:
        of_lines = {line.name: line.verdict for line in gate.lines}
        measured.append({"command": "mistral-lora smoke . --gate", "results": of_lines, "gate": gate.to_json()})
    return measured


def environment() -> dict[str, Any]:
    """Return Python, machine and libraries of this process: the manifest's `environment`."""
    packages = {}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):
            packages[name] = version(name)
    image = container_image()
    return {
        **({"image": image} if image else {}),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": packages,
    }
