"""`DECISION.md`: the run as a decision record: context, decision, evidence, and how to do it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

DECISION = "DECISION.md"


def decision_text(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return the decision record of a run, in Markdown.

    Args:
        manifest: The run's manifest; `files` is not used.
        recipe: The recipe as plain JSON data.
    """
    parts = (_context, _decision, _masking, _evaluation, _consequences, _reproduce)
    title = f"# Fine-tune {manifest['base']} with LoRA on {_data_names(manifest)}"
    return "\n\n".join([title, "Status: trained", *(part(manifest, recipe) for part in parts)]) + "\n"


def _data_names(manifest: Mapping[str, Any]) -> str:
    return ", ".join(entry["path"] for entry in manifest["dataset"]["files"])


def _context(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    dataset, tokenizer = manifest["dataset"], manifest["tokenizer"]
    rows = [
        ("Base", f"`{manifest['base']}`"),
        ("Revision", f"`{manifest['revision']}`" if manifest["revision"] else "none: a local base"),
        ("Base weights SHA-256", f"`{manifest['base_weights_sha256']}`"),
        ("Dataset SHA-256", f"`{manifest['dataset_sha256']}`"),
        *((f"Data file `{entry['path']}`", f"{entry['rows']} rows, `{entry['sha256']}`") for entry in dataset["files"]),
        *((f"Held-out file `{entry['path']}`", f"`{entry['sha256']}`") for entry in dataset["eval_files"]),
        ("Rows", f"{dataset.get('rows_used', dataset['rows'])} trained on, {dataset['held_out_rows']} held out"),
        *_removed("Rows to train on", dataset),
        *_removed("Held-out rows", dataset.get("held_out_removed", {})),
        ("Tokenizer", f"{tokenizer['version'] or tokenizer['file']} through {tokenizer['backend']}"),
        ("Tokenizer SHA-256", f"`{tokenizer['sha256']}`"),
        ("Chat template SHA-256", f"`{manifest['template']['sha256']}` ({manifest['template']['source']})"),
    ]
    return "## Context\n\n" + _table(rows)


def _removed(name: str, part: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield what truncation and filtering did to rows, if anything."""
    said = [f"{number} dropped ({reason})" for reason, number in part.get("rows_dropped", {}).items()]
    said += [f"{part['rows_truncated']} cut"] if part.get("rows_truncated") else []
    said += [f"{part['rows_without_loss']} without loss"] if part.get("rows_without_loss") else []
    if said:
        removed = f"{part['tokens_removed']} tokens removed, {part['supervised_tokens_removed']} of them with loss"
        yield name, f"{', '.join(said)}: {removed}"


def _decision(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    lora, training = manifest["lora"], manifest["training"]
    schedule = training["schedule"]
    rows = [
        ("LoRA", _lora(lora)),
        ("Layers", f"{lora['layers']}: {', '.join(lora['target_modules'])}"),
        ("Trained numbers", f"{lora['parameters']}"),
        ("Steps", f"{training['steps']} of {training['batch_size']} rows ({training['epochs']:g} epochs)"),
        ("Learning rate", f"{training['learning_rate']:g}, {training['optimizer']}"),
        ("Schedule", f"{schedule['name']}, {schedule['warmup_steps']} warm-up steps, {schedule['total_steps']} in all"),
        *(
            (("Skipped steps", f"{training['skipped_steps']}: fp16 overflowed"),)
            if training.get("skipped_steps")
            else ()
        ),
        ("Seeds", f"{manifest['seed']} for the adapter and dropout, {training['order_seed']} for the order of rows"),
        ("Precision", _precision(training)),
    ]
    return "## Decision\n\n" + _table(rows)


def _lora(lora: Mapping[str, Any]) -> str:
    text = f"r {lora['r']}, alpha {lora['alpha']:g}, dropout {lora['dropout']:g}, rslora {lora['rslora']}"
    text += ", DoRA" if lora.get("dora") else ""
    return f"{text}; {' and '.join(lora['modules_to_save'])} in full" if lora.get("modules_to_save") else text


def _precision(training: Mapping[str, Any]) -> str:
    quantized = f" in {training['quantization']}" if training.get("quantization") else ""
    kernels = f", {training['kernels']} kernels" if training.get("kernels") else ""
    base = f"{training['precision']} base{quantized}"
    return f"{base}, {training['adapter_dtype']} adapter, on {training['device']}{kernels}"


def _masking(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    masking = manifest["masking"]
    share = masking["supervised_tokens"] / masking["tokens"]
    return (
        "## What is learned\n\n"
        f"Supervised: {masking['policy']}. {masking['supervised_tokens']} of {masking['tokens']} tokens ({share:.0%}) "
        "carry loss. `rendered_row.json` shows one row token by token."
    )


def _evaluation(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    lines = ["## Evaluation", ""]
    for one in manifest["evaluation"]:
        lines += [
            f"`{one['command']}`",
            "",
            _table((name, _shown(value)) for name, value in one["results"].items()),
            "",
        ]
    return "\n".join(lines).rstrip()


def _shown(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|")


def _consequences(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    return (
        "## Consequences\n\n"
        "This folder holds an adapter, not a model: it is valid on the base weights above and on no others. "
        "Facts that `mistral-lora verify` computes again are hashes, the adapter's shape and its configuration; "
        "schedule, environment and evaluation are as the trainer declared them."
    )


def _reproduce(manifest: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    packages = " ".join(f"{name}=={version}" for name, version in manifest["environment"]["packages"].items())
    return (
        "## How to do it again\n\n"
        f"```\npip install {packages}\npython -m pytest_mistral_lora.training recipe.yaml\n```\n\n"
        "with this `recipe.yaml` (JSON is YAML). On the same machine, libraries and thread count, the adapter is equal "
        "bit for bit on a CPU; elsewhere losses agree within rounding.\n\n"
        f"```json\n{json.dumps(recipe, indent=2, ensure_ascii=False)}\n```"
    )


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
