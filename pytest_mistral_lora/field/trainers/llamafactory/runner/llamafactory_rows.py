"""The rows that `llamafactory-cli train FILE` would train on, by its `stage`: chat rows, pairs or rated answers."""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from harness import MARK, CapturedError, Encoded, Task, labelled, main, marked

_PACKAGES = ("llamafactory", "trl", "transformers", "tokenizers", "datasets", "mistral-common", "torch", "torchaudio")

_SET = {
    "do_train": True,
    "bf16": False,
    "fp16": False,
    "pure_bf16": False,
    "report_to": "none",
    "plot_loss": False,
    "overwrite_cache": True,
    "overwrite_output_dir": True,
}
"""Keys that are replaced in every configuration; ids and labels do not depend on them."""
_DROPPED = (
    "eval_dataset",
    "val_size",
    "adapter_name_or_path",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "flash_attn",
    "resume_from_checkpoint",
    "quantization_bit",
    "model_revision",
    "tokenized_path",
    "do_eval",
    "do_predict",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "max_samples",
)
"""Keys that name other data, another model, or a GPU's kernel."""
_FILE_KEYS = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name", "subset", "split")


def encode(task: Task) -> list[Encoded]:
    """Return the rows of the dataset that LLaMA-Factory's own command builds."""
    refused = [(row[MARK], {"error": reason}) for row in task.rows if (reason := _without_form(row))]
    if refused:
        numbers = {number for number, _ in refused}
        task = replace(task, rows=[row for row in task.rows if row[MARK] not in numbers])
        if not task.rows:
            return refused
    rows = marked(ready_dataset(configuration(task)))
    return [*refused, *((row[MARK], _columns(row, task.name)) for row in rows)]


def _columns(row: dict[str, Any], stage: str) -> dict[str, Any]:
    """Return the columns of a row of LLaMA-Factory's dataset, whose ids hold the prompt."""
    if not stage:
        columns: dict[str, Any] = labelled(row["input_ids"], row["labels"])
        return columns
    if stage == "kto":
        # the other columns are the answer of another row, for the KL term
        ids = {"completion_input_ids": row["input_ids"], "completion_labels": row["labels"]}
        return {**ids, "label": row["kto_tags"]}
    # a reward model scores the last token, and reads no labels
    kinds = ("input_ids",) if stage == "rm" else ("input_ids", "labels")
    return {name: row[name] for side in ("chosen", "rejected") for name in (f"{side}_{kind}" for kind in kinds)}


def ready_dataset(config: dict[str, Any]) -> Any:
    """Return the dataset that LLaMA-Factory's own command builds by a configuration."""
    from llamafactory.train import tuner

    workflow: Any = importlib.import_module(f"llamafactory.train.{config['stage']}.workflow")

    dataset: Any = None

    def stop(*args: Any, **options: Any) -> None:
        nonlocal dataset
        dataset = original(*args, **options)["train_dataset"]
        raise CapturedError

    original, workflow.get_dataset = workflow.get_dataset, stop
    try:
        tuner.run_exp(config)
    except CapturedError:
        return dataset
    finally:
        workflow.get_dataset = original
    raise RuntimeError("LLaMA-Factory ended before it had its rows")


def configuration(task: Task) -> dict[str, Any]:
    """Return the configuration with its model, its data and its output replaced."""
    config = yaml.safe_load(task.config.read_text(encoding="utf-8")) or {}
    kept = {name: value for name, value in {**config, **_SET}.items() if name not in _DROPPED}
    kept["stage"] = task.name or "sft"
    fixed = {"model_name_or_path": str(task.checkpoint), "output_dir": str(task.folder / "out")}
    if not task.own_data:
        return {**kept, "dataset_dir": _dataset_folder(task, config), **fixed}
    return {**kept, **{name: config[name] for name in ("tokenized_path",) if name in config}, **fixed}


def _dataset_folder(task: Task, config: dict[str, Any]) -> str:
    """Write the rows and a `dataset_info.json` as the configuration's own describes them; return their folder."""
    names = config.get("dataset") or ""
    names = [name.strip() for name in (names.split(",") if isinstance(names, str) else names)]
    if len(names) != 1 or not names[0]:
        raise ValueError(
            f"dataset: {config.get('dataset')!r}; one dataset of dataset_info.json can be given other rows"
        )
    folder = Path(config.get("dataset_dir", "data"))
    if not (folder / "dataset_info.json").is_file():
        # beside the configuration, if the current folder lacks it
        folder = task.config.parent / folder
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    if names[0] not in info:
        raise ValueError(f"{names[0]!r} is not in {folder / 'dataset_info.json'}")
    entry = {name: value for name, value in info[names[0]].items() if name not in _FILE_KEYS}
    _refuse_columns(entry, task.name)
    file = task.rows_file([_in_form(row, entry) for row in task.rows])
    described = {names[0]: {**entry, "file_name": file.name}}
    (file.parent / "dataset_info.json").write_text(json.dumps(described), encoding="utf-8")
    return str(file.parent)


def _without_form(row: dict[str, Any]) -> str:
    """Return why a pair cannot be written for LLaMA-Factory; empty if it can."""
    for side in ("chosen", "rejected"):
        if side in row and len(row[side]) != 1:
            return f"`{side}` has {len(row[side])} messages, and LLaMA-Factory takes one message as an answer"
    return ""


def _refuse_columns(entry: dict[str, Any], stage: str) -> None:
    """Refuse a description that LLaMA-Factory would read without the answers of a stage.

    Raises:
        ValueError: If it lacks the key of the pairs, or the columns of the answers.
    """
    columns = {"dpo": ("chosen", "rejected"), "rm": ("chosen", "rejected"), "kto": ("kto_tag",)}.get(stage, ())
    missing = [f"columns: {name}" for name in columns if name not in entry.get("columns", {})]
    if "chosen" in columns and not entry.get("ranking"):
        missing.append("ranking: true")
    if missing:
        raise ValueError(f"dataset_info.json has no {', '.join(missing)}, which stage: {stage} needs")


def _in_form(row: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Return a row in the columns of `dataset_info.json`, as LLaMA-Factory's own data folder describes them."""
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("sharegpt", "openai"):
        raise ValueError(f"formatting: {formatting}; chat rows need sharegpt or openai")
    columns = {"messages": "conversations", **entry.get("columns", {})}
    tags = entry.get("tags", {})
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row.get("completion", ())]
    made: dict[str, Any] = {columns["messages"]: [_message(message, formatting, tags) for message in messages]}
    for side in ("chosen", "rejected"):
        if side in row:
            made[columns[side]] = _message(row[side][0], formatting, tags)
    if "label" in row:
        made[columns["kto_tag"]] = row["label"]
    if "tools" in columns:
        made[columns["tools"]] = json.dumps([tool["function"] for tool in row["tools"]]) if row.get("tools") else ""
    return {**made, MARK: row[MARK]}


def _message(message: dict[str, Any], formatting: str, tags: dict[str, str]) -> dict[str, Any]:
    role, content, calls = message["role"], message.get("content"), message.get("tool_calls")
    names = {
        "system": tags.get("system_tag", "system"),
        "user": tags.get("user_tag", "human"),
        "assistant": tags.get("assistant_tag", "gpt"),
        "tool": tags.get("observation_tag", "observation"),
    }
    form = {tags.get("role_tag", "from"): names[role], tags.get("content_tag", "value"): content}
    if calls and formatting == "openai":
        return {**form, "tool_calls": calls}
    if calls:
        form[tags.get("role_tag", "from")] = tags.get("function_tag", "function_call")
        form[tags.get("content_tag", "value")] = json.dumps([_call(call["function"]) for call in calls])
    return form


def _call(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    return {"name": function["name"], "arguments": parsed}


def stand_in_for_torchaudio() -> dict[str, str]:
    """Provide an empty torchaudio if the real one cannot be imported: LLaMA-Factory only needs it for sound."""
    try:
        importlib.import_module("torchaudio")
    except (ImportError, OSError):
        # a failed import leaves its submodules behind, which would pass for the stand-in's
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchaudio"]:
            del sys.modules[name]
        # An empty package in a new folder: transformers looks for torchaudio as a file, so a module object in
        # sys.modules is not enough.
        stand_in = Path(tempfile.mkdtemp(prefix="stand-in-")) / "torchaudio"
        stand_in.mkdir()
        (stand_in / "__init__.py").touch()
        sys.path.insert(0, str(stand_in.parent))
        return {"torchaudio": "an empty stand-in: the real one cannot be imported here"}
    return {}


if __name__ == "__main__":
    main(encode, _PACKAGES, stand_in_for_torchaudio())
